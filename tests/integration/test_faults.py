"""What breaks, and what must not: Triton killed, tenants removed, replaced, broken; each with the others going on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from numpy.typing import NDArray
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException

from compositor.deadline import Deadline
from compositor.errors import TenantBroken, TritonUnavailable
from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc
from compositor.settings import Settings, TritonSettings
from compositor.triton import inference as inference_module
from compositor.triton.connection import GivenUp
from compositor.triton.inference import Mouths, Triton
from compositor.triton.shared_memory import Region
from compositor.triton.slots import MOST_REGIONS
from lipsync import architecture
from lipsync.graph_builder import GraphBuilder
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_encoder, add_tenant, remove_tenant
from lipsync.sources import open_source
from lipsync.tritonserver import EmbeddedTriton, TritonHome

from ..conftest import ServiceThread, Stack, connect, running_stack, silent, write_small_source
from .failing_triton import FailingTriton
from .processes import freeze
from .waiting import until

pytestmark = pytest.mark.triton

Tone = Callable[[float, int], NDArray[np.float32]]
ONE = np.zeros((1, 32, 16, 16), np.float32)


def nan_when_loud() -> onnx.ModelProto:
    """Predicts the ROI, but NaN where the mean of the audio features is above 0.5."""
    batch = "n"
    half = helper.make_tensor("half", TensorProto.FLOAT, [], [0.5])
    nodes = [
        helper.make_node("Slice", ["visual", "zero", "three", "one"], ["roi"]),
        helper.make_node("ReduceMean", ["audio"], ["mean"], axes=[1, 2, 3], keepdims=1),
        helper.make_node("Greater", ["mean", "half"], ["loud"]),
        helper.make_node("Cast", ["loud"], ["flag"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["quiet", "flag"], ["root_of"]),
        helper.make_node("Sqrt", ["root_of"], ["one_or_nan"]),
        helper.make_node("Mul", ["roi", "one_or_nan"], ["output"]),
    ]
    integers = [
        helper.make_tensor(name, TensorProto.INT64, [1], [n]) for name, n in (("zero", 0), ("three", 3), ("one", 1))
    ]
    graph = helper.make_graph(
        nodes,
        "nan_when_loud",
        [
            helper.make_tensor_value_info("visual", TensorProto.FLOAT, [batch, 6, 320, 320]),
            helper.make_tensor_value_info("audio", TensorProto.FLOAT, [batch, 32, 16, 16]),
        ],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, 3, 320, 320])],
        [*integers, half, helper.make_tensor("quiet", TensorProto.FLOAT, [], [0.5])],
    )
    # 0.5 - 1 is negative, and its root NaN; 0.5 - 0 only darkens.
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def small(tmp_path: Path, triton_home: Path) -> Iterator[Stack]:
    """A stack of its own, to be broken: the encoder does nothing, the tenants are `one` and `two`."""
    repository = tmp_path / "repository"
    repository.mkdir()
    onnx.save(architecture.do_nothing_encoder(), tmp_path / "encoder.onnx")
    add_encoder(repository, "audio_encoder", tmp_path / "encoder.onnx")
    source = write_small_source(tmp_path / "source", architecture.do_nothing(), frames=4)
    for name in ("one", "two"):
        add_tenant(repository, name, open_source(source), Choices(), Serving(threads=1), silent)
    with running_stack(repository) as running:
        yield running


@pytest.fixture
def small_stub(small: Stack) -> Iterator[pb_grpc.LipsyncStub]:
    yield from connect(small.service.address)


def ask(stub: pb_grpc.LipsyncStub, tenant: str, features: NDArray[np.float32] = ONE) -> list[bytes]:
    request = pb.CompositeRequest(tenant=tenant, start=0, features=features.tobytes())
    return [frame.data for frame in stub.Composite(request, timeout=60).frames]


def refused(stub: pb_grpc.LipsyncStub, tenant: str, features: NDArray[np.float32] = ONE) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        ask(stub, tenant, features)
    error: Any = caught.value
    return error.code().name, error.details()


@pytest.mark.parametrize("slots", [2, 16])
def test_triton_killed_under_load_costs_no_request(small: Stack, slots: int) -> None:
    values = small.service.settings.model_dump()
    values["triton"]["slots"] = slots
    service = ServiceThread(Settings.model_validate(values))
    service.start()
    stop = threading.Event()
    answers: list[bool] = []

    def load(tenant: str) -> None:
        for stub in connect(service.address):
            expected = ask(stub, tenant)
            while not stop.is_set():
                answers.append(ask(stub, tenant) == expected)

    threads = [threading.Thread(target=load, args=(("one", "two")[number % 2],)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(answers) > 40)
        assert small.triton.pid is not None
        os.kill(small.triton.pid, signal.SIGKILL)
        until(lambda: small.triton.restarts > 0)
        before = len(answers)
        until(lambda: len(answers) > before + 80)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        service.stop()
    assert all(answers)


async def test_triton_takes_requests_while_models_come_and_go_however_it_was_started(
    small: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --strict-readiness=false it says itself that it is not ready."""
    command = EmbeddedTriton._command

    def with_defaults(self: EmbeddedTriton, home: TritonHome, server_id: str) -> list[str]:
        return [word for word in command(self, home, server_id) if not word.startswith("--strict-readiness")]

    monkeypatch.setattr(EmbeddedTriton, "_command", with_defaults)
    server = FailingTriton(small.repository, tmp_path / "backends")
    with server, triton.InferenceServerClient(server.grpc) as client:
        asking = Triton(TritonSettings(), server.grpc)
        for name in ("one", "two"):
            await asking.load(name)
        server.hang("one")
        asked = asyncio.create_task(asking.mouths("one", np.zeros(1, np.int32), ONE, Deadline.after(60)))
        while not server.has_hung("one"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        # It stays until it has answered.
        client.unload_model("one")
        assert (await asking.states())["one"] == "UNLOADING"
        assert not client.is_server_ready()
        assert await asking.ping(30)
        server.hang()
        (await asked).release()
        while (await asking.states()).get("one"):
            assert await asking.ping(30)
        with pytest.raises(TenantBroken):
            await asking.load("nobody")
        assert await asking.ping(30)
        await asking.close()


async def test_a_triton_that_stops_takes_no_requests_and_one_that_starts_takes_loads(small: Stack) -> None:
    asking = Triton(TritonSettings(), small.triton.grpc)
    await asking.load("one")
    assert small.triton.pid is not None
    # Nobody starts it again before it was seen to be gone.
    with frozen(small.triton.keeper_pid):
        os.kill(small.triton.pid, signal.SIGTERM)
        with contextlib.suppress(TritonUnavailable):
            while await asking.ping(30):
                pass
    takes_requests = False
    while not takes_requests:
        with contextlib.suppress(TritonUnavailable):
            takes_requests = await asking.ping(30)
    await asking.load("two")
    await asking.close()


@contextlib.contextmanager
def frozen(pid: int | None) -> Iterator[None]:
    """Meanwhile a process stands still: a server accepts, and does not answer."""
    assert pid is not None
    freeze(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_memory_is_taken_back_from_a_triton_that_hung_and_its_late_answers_harm_nobody(
    small: Stack, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference_module, "_BRIEF_S", 60.0)
    asking = Triton(TritonSettings(slots=2, slot_frames=1), small.triton.grpc)
    for name in ("one", "two"):
        await asking.load(name)

    async def mouths(tenant: str) -> Mouths:
        return await asking.mouths(tenant, np.zeros(1, np.int32), ONE, Deadline.after(60))

    with triton.InferenceServerClient(small.triton.grpc) as client:
        others = set(client.get_system_shared_memory_status().regions)
        (await mouths("one")).release()
        for _ in range(2 * MOST_REGIONS):
            held = await mouths("two")
            expected = held.crops.copy()
            with frozen(small.triton.pid):
                asked = asyncio.create_task(mouths("one"))
                while not asking.silent_s() and not asked.done():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)  # until it is on its way
                asking.give_up()
                with pytest.raises(GivenUp):
                    await asked
            while not await asking.ping(30):
                pass
            newer = await mouths("one")
            assert np.array_equal(held.crops, expected)
            assert not np.shares_memory(held.crops, newer.crops)
            for each in (held, newer):
                each.release()
            own = set(client.get_system_shared_memory_status().regions) - others
            assert 1 <= len(own) <= MOST_REGIONS
        await asking.close()
        assert set(client.get_system_shared_memory_status().regions) == others
    assert "mouths come as tensors" not in caplog.text


EXP = {
    "backend": "onnxruntime",
    "max_batch_size": 0,
    "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [1]}],
    "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [1]}],
    "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
}


def exp_model() -> onnx.ModelProto:
    """Answers with something else than 0."""
    graph = GraphBuilder("exp")
    graph.node("Exp", [graph.input("x", [1])], "exp", output="y")
    graph.output("y", [1], TensorProto.FLOAT)
    return graph.model()


def test_triton_keeps_memory_that_a_request_names_until_it_has_answered_it(tmp_path: Path, triton_home: Path) -> None:
    """Also where nobody waits for the answer any more: what `slots` takes back rests upon it."""
    region = Region(4, 4096)
    tensor = triton.InferInput("x", [1], "FP32")
    tensor.set_data_from_numpy(np.full(1, 1e-3, np.float32))
    (tmp_path / "repository").mkdir()
    server = FailingTriton(tmp_path / "repository", tmp_path / "backends")
    with server, triton.InferenceServerClient(server.grpc) as client:
        files = {"file:1/model.onnx": exp_model().SerializeToString()}
        client.load_model("exp", config=json.dumps(EXP), files=files)
        client.register_system_shared_memory(region.name, region.key, region.size)
        region.forget_name()
        server.hang("exp")
        with triton.InferenceServerClient(server.grpc) as leaving:
            for slot in range(4):
                answer = triton.InferRequestedOutput("y")
                answer.set_shared_memory(region.name, 4, region.offset(slot))
                leaving.async_infer("exp", [tensor], lambda result, error: None, outputs=[answer])
            until(lambda: server.has_hung("exp"))
        with pytest.raises(InferenceServerException):
            client.unregister_system_shared_memory(region.name)
        server.hang()
        while region.name in client.get_system_shared_memory_status().regions:
            with contextlib.suppress(InferenceServerException):
                client.unregister_system_shared_memory(region.name)
        written = [bool(region.view(slot, 4).any()) for slot in range(4)]
        client.unload_model("exp")
        until(lambda: all(model.state != "UNLOADING" for model in client.get_model_repository_index().models))
    region.let_go()
    assert any(written)
    assert [bool(region.view(slot, 4).any()) for slot in range(4)] == written


def test_triton_killed_in_the_middle_of_a_stream(small: Stack, small_stub: pb_grpc.LipsyncStub, tone: Tone) -> None:
    speech = pb.Speech(data=(tone(20.0, 16_000) * 32767).astype("<i2").tobytes())
    count = 0
    for answer in small_stub.Generate(pb.GenerateRequest(tenant="one", speech=speech), timeout=120):
        count += answer.HasField("frame")
        if count == 50 and small.triton.restarts == 0:
            assert small.triton.pid is not None
            os.kill(small.triton.pid, signal.SIGKILL)
            until(lambda: small.triton.restarts > 0)
    assert count == 500


def test_a_tenant_added_while_the_service_runs_is_live_at_once(
    small: Stack, small_stub: pb_grpc.LipsyncStub, tmp_path: Path
) -> None:
    assert refused(small_stub, "three")[0] == "NOT_FOUND"
    source = write_small_source(tmp_path / "third", architecture.do_nothing(), frames=3, seed=9)
    add_tenant(small.repository, "three", open_source(source), Choices(), Serving(threads=1), silent)
    assert len(ask(small_stub, "three")) == 1


def test_a_removed_tenant_is_gone_and_a_new_one_of_its_name_is_the_new_one(
    small: Stack, small_stub: pb_grpc.LipsyncStub, tmp_path: Path
) -> None:
    old = ask(small_stub, "one")
    until(lambda: "one" in small.triton.resident)
    remove_tenant(small.repository, "one")
    assert refused(small_stub, "one")[0] == "NOT_FOUND"
    until(lambda: "one" not in small.triton.resident)
    source = write_small_source(tmp_path / "other", architecture.do_nothing(), frames=4, seed=7)
    add_tenant(small.repository, "one", open_source(source), Choices(idle="background"), Serving(threads=1), silent)
    new = ask(small_stub, "one")
    assert new != old
    assert ask(small_stub, "two") == old


def test_a_damaged_tenant_is_named_and_the_others_go_on(small: Stack, small_stub: pb_grpc.LipsyncStub) -> None:
    scans = small.repository / "one" / "1" / "scans.bin"
    scans.write_bytes(scans.read_bytes()[:-100])
    code, words = refused(small_stub, "one")
    assert code == "FAILED_PRECONDITION"
    assert "'one' is damaged: scans.bin has" in words
    assert len(ask(small_stub, "two")) == 1


def test_a_model_that_does_not_load_is_named_and_the_others_go_on(
    small: Stack, small_stub: pb_grpc.LipsyncStub
) -> None:
    model = small.repository / "one" / "1" / "model.onnx"
    model.write_bytes(b"x" * model.stat().st_size)
    code, words = refused(small_stub, "one")
    assert code == "FAILED_PRECONDITION"
    assert "'one' does not load into Triton" in words
    assert len(ask(small_stub, "two")) == 1


def test_a_missing_encoder_is_named(small: Stack, small_stub: pb_grpc.LipsyncStub, tone: Tone) -> None:
    shutil.rmtree(small.repository / "audio_encoder")
    speech = pb.Speech(data=tone(1.0, 16_000).tobytes(), encoding=pb.Speech.FLOAT32)
    with pytest.raises(grpc.RpcError) as caught:
        list(small_stub.Generate(pb.GenerateRequest(tenant="one", speech=speech), timeout=60))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "audio encoder 'audio_encoder'" in error.details()
    assert len(ask(small_stub, "one")) == 1


def test_a_prediction_that_is_not_finite_fails_its_own_request_only(
    small: Stack, small_stub: pb_grpc.LipsyncStub, tmp_path: Path
) -> None:
    source = write_small_source(tmp_path / "nan", nan_when_loud(), frames=4)
    add_tenant(small.repository, "nan", open_source(source), Choices(), Serving(threads=1), silent)
    assert len(ask(small_stub, "nan")) == 1
    assert refused(small_stub, "nan", np.ones_like(ONE)) == (
        "FAILED_PRECONDITION",
        "the model of 'nan' predicted NaN or infinity",
    )
    assert len(ask(small_stub, "nan")) == 1


def test_mouths_come_as_tensors_where_shared_memory_is_off(small: Stack, small_stub: pb_grpc.LipsyncStub) -> None:
    values = small.service.settings.model_dump()
    values["triton"]["shared_memory"] = "off"
    service = ServiceThread(Settings.model_validate(values))
    service.start()
    try:
        for stub in connect(service.address):
            assert ask(stub, "one", np.zeros((9, 32, 16, 16), np.float32)) == ask(
                small_stub, "one", np.zeros((9, 32, 16, 16), np.float32)
            )
    finally:
        service.stop()


def test_no_triton_is_unavailable_with_a_hint_when_to_retry(small: Stack) -> None:
    values = small.service.settings.model_dump()
    values["triton"] |= {"endpoints": "127.0.0.1:1", "restart_wait_s": 0.2}
    service = ServiceThread(Settings.model_validate(values))
    service.start()
    try:
        for stub in connect(service.address):
            code, words = refused(stub, "one")
            assert code == "UNAVAILABLE"
            assert "Triton cannot be reached" in words
            with pytest.raises(grpc.RpcError) as caught:
                ask(stub, "one")
            retry = error_details_pb2.RetryInfo()
            assert any(detail.Unpack(retry) for detail in rpc_status.from_call(caught.value).details)
            assert retry.retry_delay.ToMilliseconds() > 0
    finally:
        service.stop()


def test_more_calls_than_the_limit_are_told_to_come_back(small: Stack, tone: Tone) -> None:
    values = small.service.settings.model_dump()
    values["server"]["max_calls"] = 1
    service = ServiceThread(Settings.model_validate(values))
    service.start()
    try:
        for stub in connect(service.address):
            speech = pb.Speech(data=(tone(60.0, 16_000) * 32767).astype("<i2").tobytes())
            raw = pb.Output(format=pb.Output.BGR24)  # a few of which fill what gRPC takes unread
            stream = stub.Generate(pb.GenerateRequest(tenant="one", speech=speech, output=raw), timeout=60)
            next(stream)
            assert refused(stub, "two") == ("RESOURCE_EXHAUSTED", "1 calls are being served already")
            stream.cancel()
            until(partial(serves, stub, "two"))
    finally:
        service.stop()


def serves(stub: pb_grpc.LipsyncStub, tenant: str) -> bool:
    try:
        ask(stub, tenant)
    except grpc.RpcError:
        return False
    return True


def test_nothing_stays_in_shared_memory(small: Stack, small_stub: pb_grpc.LipsyncStub) -> None:
    def regions() -> set[Path]:
        return set(Path("/dev/shm").glob("lipsync-region-*"))

    others = regions()
    ask(small_stub, "one")
    # Another process's is there for a moment.
    until(lambda: regions() <= others)


def test_requests_of_several_callers_share_batches(small: Stack, small_stub: pb_grpc.LipsyncStub) -> None:
    ask(small_stub, "one")

    def counts() -> tuple[int, int]:
        with triton.InferenceServerClient(small.triton.grpc) as client:
            stats = client.get_inference_statistics("one").model_stats[0]
            return stats.inference_count, stats.execution_count

    before = counts()
    threads = [threading.Thread(target=lambda: [ask(small_stub, "one") for _ in range(25)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Triton counts a request only after it was answered.
    until(lambda: counts()[0] - before[0] >= 200)
    inferences, executions = (after - start for after, start in zip(counts(), before, strict=True))
    assert executions < inferences
