"""The embedded Triton for real: started, loaded, killed in every way, and gone afterwards without a trace.

Processes are told by the keeper's session and regions by its prefix, so other servers may run beside these tests.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException

from compositor.errors import InvalidInput, TritonUnavailable
from lipsync import triton_processes
from lipsync.tritonserver import EmbeddedTriton

pytestmark = [pytest.mark.triton, pytest.mark.timeout(120)]
DEADLINE_S = 60.0
OWNER = """
import os, sys, time
from pathlib import Path
from lipsync.tritonserver import EmbeddedTriton
import tritonclient.grpc as triton
with EmbeddedTriton(Path(sys.argv[1])) as server:
    triton.InferenceServerClient(server.grpc).load_model("double")
    forked = os.fork() if sys.argv[2:] == ["fork"] else None
    if forked == 0:
        time.sleep(600)
    print(server.keeper_pid, server.pid, forked or 0, flush=True)
    while True:
        # Short: a signal between the interpreter's last look and the system call ends the loop, not the sleep.
        time.sleep(0.05)
"""


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:.0f} s: {what}"
        time.sleep(0.02)


def add_model(repository: Path, name: str, queue_delay_us: int = 0) -> None:
    """A model whose `y` is twice `x`, and whose BOOL `positive` says for each row whether its sum is positive."""
    shape: list[str | int | None] = ["n", 3]
    nodes = [
        helper.make_node("Add", ["x", "x"], ["y"]),
        helper.make_node("ReduceSum", ["x", "axes"], ["sum"], keepdims=1),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
    ]
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("positive", TensorProto.BOOL, ["n", 1]),
        ],
        [
            helper.make_tensor("axes", TensorProto.INT64, [1], [1]),
            helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]),
        ],
    )
    folder = repository / name
    (folder / "1").mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(folder / "1" / "model.onnx"))
    (folder / "config.pbtxt").write_text(
        f"""
        backend: "onnxruntime"
        max_batch_size: 16
        input [{{ name: "x" data_type: TYPE_FP32 dims: [3] }}]
        output [{{ name: "y" data_type: TYPE_FP32 dims: [3] }}, {{ name: "positive" data_type: TYPE_BOOL dims: [1] }}]
        instance_group [{{ kind: KIND_CPU count: 1 }}]
        dynamic_batching {{ max_queue_delay_microseconds: {queue_delay_us} }}
        parameters {{ key: "intra_op_thread_count" value: {{ string_value: "1" }} }}
        """
    )


def infer(client: triton.InferenceServerClient, name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tensor = triton.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    result = client.infer(name, [tensor])
    return result.as_numpy("y"), result.as_numpy("positive")


def is_ready(client: triton.InferenceServerClient, name: str) -> bool:
    try:
        return bool(client.is_model_ready(name))
    except InferenceServerException:
        return False


def regions(keeper_pid: int) -> list[str]:
    return [path.name for path in triton_processes.SHM.glob(f"{triton_processes.REGION_PREFIX}*-{keeper_pid}-*")]


def trace_of(keeper_pid: int) -> list[object]:
    """What is left of a keeper: itself, its session's processes, its regions."""
    alive = [keeper_pid] if triton_processes.process_start_time(keeper_pid) is not None else []
    return [*alive, *triton_processes.session_members(keeper_pid), *regions(keeper_pid)]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    add_model(folder, "double")
    add_model(folder, "other")
    # It need not wait for so long: 16 requests are enough.
    add_model(folder, "patient", queue_delay_us=1_000_000)
    return folder


@pytest.fixture(scope="module")
def shared_server(repository: Path) -> Iterator[EmbeddedTriton]:
    with EmbeddedTriton(repository) as server:
        yield server


@pytest.fixture
def server(repository: Path) -> Iterator[EmbeddedTriton]:
    """A server of the test's own, which it may kill."""
    with EmbeddedTriton(repository) as server:
        yield server


@pytest.fixture
def client(request: pytest.FixtureRequest) -> Iterator[triton.InferenceServerClient]:
    name = "server" if "server" in request.fixturenames else "shared_server"
    with triton.InferenceServerClient(request.getfixturevalue(name).grpc) as client:
        yield client


@contextlib.contextmanager
def owner_process(repository: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """A process in a group of its own that owns an embedded Triton with a resident model: (it, keeper, server)."""
    forked = 0
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(repository), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=os.setpgrp,
    )
    assert owner.stdout is not None
    try:
        keeper_pid, server_pid, forked = map(int, owner.stdout.readline().split())
        assert regions(keeper_pid)
        yield owner, keeper_pid, server_pid
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
        if forked:
            os.kill(forked, signal.SIGKILL)


def test_starts_ready_with_nothing_loaded(shared_server: EmbeddedTriton, client: triton.InferenceServerClient) -> None:
    assert client.is_server_ready()
    assert shared_server.alive
    assert shared_server.pid is not None
    states = {entry.name: entry.state for entry in client.get_model_repository_index().models}
    assert set(states) == {"double", "other", "patient"}
    assert "READY" not in states.values()


def test_listens_on_the_loopback_address_only(shared_server: EmbeddedTriton) -> None:
    for address in (shared_server.grpc, shared_server.http, shared_server.metrics):
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), timeout=DEADLINE_S):
            pass
        with socket.socket() as probe:
            # Binding another loopback address works only where nobody listens on the wildcard.
            probe.bind(("127.0.0.2", int(port)))


def test_loads_infers_and_unloads(client: triton.InferenceServerClient) -> None:
    client.load_model("double")
    x = np.array([[1, 2, 3], [-4, 5, -6]], np.float32)
    y, positive = infer(client, "double", x)
    np.testing.assert_array_equal(y, x * 2)
    np.testing.assert_array_equal(positive, [[True], [False]])
    client.unload_model("double")
    eventually(lambda: not is_ready(client, "double"), "unloaded")
    with pytest.raises(InferenceServerException, match="no available versions"):
        infer(client, "double", x)


def test_concurrent_requests_share_an_execution(client: triton.InferenceServerClient) -> None:
    client.load_model("patient")

    def ask(i: int) -> bool:
        x = np.full((1, 3), i, np.float32)
        y, positive = infer(client, "patient", x)
        return bool((y == 2 * i).all()) and bool(positive[0, 0]) == (i > 0)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(160)))

    def counts() -> tuple[int, int]:
        statistics = client.get_inference_statistics("patient").model_stats[0]
        return statistics.inference_count, statistics.execution_count

    # A request is counted only after it was answered.
    eventually(lambda: counts()[0] == 160, "all are counted")
    assert counts()[1] < 80


def test_only_requested_outputs_are_sent(client: triton.InferenceServerClient) -> None:
    client.load_model("double")
    tensor = triton.InferInput("x", [1, 3], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 3), np.float32))
    result = client.infer("double", [tensor], outputs=[triton.InferRequestedOutput("positive")])
    assert [output.name for output in result.get_response().outputs] == ["positive"]


def test_killed_server_comes_back_with_what_was_resident(
    server: EmbeddedTriton, client: triton.InferenceServerClient
) -> None:
    addresses = (server.grpc, server.http, server.metrics)
    client.load_model("double")
    client.load_model("other")
    # Else it may be looking at what is loaded now when the server dies.
    eventually(lambda: server.resident == {"double", "other"}, "the keeper knows what is resident")
    client.unload_model("other")
    eventually(lambda: server.resident == {"double"}, "the keeper knows what is left")
    first = server.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    eventually(lambda: server.restarts > 0 and server.pid not in (None, first), "another server is ready")
    eventually(lambda: is_ready(client, "double"), "the resident model is loaded again")
    assert not is_ready(client, "other")
    assert (server.grpc, server.http, server.metrics) == addresses
    np.testing.assert_array_equal(infer(client, "double", np.ones((1, 3), np.float32))[0], np.full((1, 3), 2))
    assert server.keeper_pid is not None
    assert len(regions(server.keeper_pid)) == 1, "the dead server's regions are gone"


def test_stop_leaves_nothing(repository: Path) -> None:
    server = EmbeddedTriton(repository)
    server.start()
    before = backend_folders()
    with triton.InferenceServerClient(server.grpc) as client:
        client.load_model("double")
    made = backend_folders() - before
    keeper_pid = server.keeper_pid
    assert keeper_pid is not None
    assert len(trace_of(keeper_pid)) >= 4, "keeper, server, stub, region"
    server.stop()
    assert trace_of(keeper_pid) == []
    assert made - backend_folders(), "of those of all Tritons on this machine, its own is gone"
    assert server.pid is None
    server.stop()


def backend_folders() -> set[Path]:
    """What the Python backends of this machine's Tritons have made, and remove at an orderly end."""
    return set(Path("/tmp").glob("python_env_*"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_when_the_owner_is_killed(repository: Path, number: signal.Signals) -> None:
    with owner_process(repository) as (owner, keeper_pid, _):
        owner.send_signal(number)
        owner.wait(DEADLINE_S)
        eventually(lambda: trace_of(keeper_pid) == [], f"nothing left of {trace_of(keeper_pid)}")


def test_a_child_forked_off_the_owner_does_not_keep_the_server(repository: Path) -> None:
    # It holds the other end of the keeper's standard input.
    with owner_process(repository, "fork") as (owner, keeper_pid, _):
        owner.kill()
        owner.wait(DEADLINE_S)
        eventually(lambda: trace_of(keeper_pid) == [], f"nothing left of {trace_of(keeper_pid)}")


def test_nothing_is_left_after_ctrl_c(repository: Path) -> None:
    with owner_process(repository) as (owner, keeper_pid, server_pid):
        assert os.getpgid(owner.pid) not in (os.getpgid(keeper_pid), os.getpgid(server_pid))
        os.killpg(owner.pid, signal.SIGINT)
        owner.wait(DEADLINE_S)
        # The owner's own context manager has ended all before the owner itself.
        assert trace_of(keeper_pid) == []


def test_killed_keeper_takes_the_server_along(server: EmbeddedTriton, client: triton.InferenceServerClient) -> None:
    client.load_model("double")
    keeper_pid = server.keeper_pid
    assert keeper_pid is not None
    os.kill(keeper_pid, signal.SIGKILL)
    eventually(lambda: not server.alive, "the owner notices")
    # What it had open is closed a little before it is gone.
    eventually(lambda: triton_processes.process_start_time(keeper_pid) is None, "the keeper is gone")
    assert trace_of(keeper_pid) == []
    assert server.pid is None


def test_next_start_sweeps_after_keeper_and_owner_were_killed(repository: Path) -> None:
    with owner_process(repository) as (owner, keeper_pid, server_pid):
        owner.send_signal(signal.SIGSTOP)
        os.kill(keeper_pid, signal.SIGKILL)
        owner.kill()
        owner.wait(DEADLINE_S)
        eventually(lambda: triton_processes.process_start_time(server_pid) is None, "the server dies with its keeper")
        # A region like those that stay where the stub, too, was killed.
        region = triton_processes.SHM / f"{triton_processes.region_prefix(os.getpid())}leftover"
        start = triton_processes.process_start_time(os.getpid())
        stale = region.with_name(region.name.replace(f"-{os.getpid()}-{start}-", f"-{keeper_pid}-1-"))
        for path in (region, stale):
            path.write_bytes(b"\0" * 4096)
        try:
            with EmbeddedTriton(repository):
                assert regions(keeper_pid) == []
                # The stub was killed, which takes a moment.
                eventually(lambda: trace_of(keeper_pid) == [], "nothing left")
                assert region.exists(), "a living owner's region stays"
        finally:
            region.unlink()


def test_two_servers_side_by_side(shared_server: EmbeddedTriton, server: EmbeddedTriton) -> None:
    addresses = [shared_server.grpc, shared_server.http, shared_server.metrics]
    addresses += [server.grpc, server.http, server.metrics]
    assert len(set(addresses)) == 6
    with (
        triton.InferenceServerClient(shared_server.grpc) as first,
        triton.InferenceServerClient(server.grpc) as second,
    ):
        first.load_model("other")
        assert is_ready(first, "other")
        assert not is_ready(second, "other")
        second.load_model("other")
        server.stop()
        assert is_ready(first, "other"), "the neighbour's models stay"
        infer(first, "other", np.ones((1, 3), np.float32))


def test_chosen_ports_are_used_and_occupied_ones_named(repository: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInput, match=f"http_port {port} .*in use") as fault:
            EmbeddedTriton(repository, http_port=port).start()
        assert fault.value.field == "http_port"
    with EmbeddedTriton(repository, http_port=port) as server:
        assert server.http == f"127.0.0.1:{port}"


def test_failed_start_quotes_the_log(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "logs" / "triton.log"
    server = EmbeddedTriton(repository, log_path=log)
    command = server._command
    monkeypatch.setattr(server, "_command", lambda *args: [*command(*args), "--model-repository=/no-such-folder"])
    with pytest.raises(TritonUnavailable, match="no-such-folder"):
        server.start()
    assert "no-such-folder" in log.read_text()
    assert not server.alive
    assert server.keeper_pid is None


def test_loading_a_model_that_does_not_fit_says_why(repository: Path, client: triton.InferenceServerClient) -> None:
    add_model(repository, "misfit")
    config = repository / "misfit" / "config.pbtxt"
    config.write_text(config.read_text().replace("dims: [1]", "dims: [2]"))
    with pytest.raises(InferenceServerException, match="output 'positive' is"):
        client.load_model("misfit")
