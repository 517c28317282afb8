"""What the real Triton says, and what we make of it: every status that the compositor tells apart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import model_config_pb2

from compositor.deadline import Deadline
from compositor.errors import InferenceFailed, Overloaded, TenantBroken
from compositor.settings import TritonSettings
from compositor.triton.channel import Client
from compositor.triton.connection import KeyRefused, ModelNotLoaded
from compositor.triton.control import config_on
from compositor.triton.inference import Triton
from lipsync.triton_install import TritonHome
from lipsync.tritonserver import EmbeddedTriton

from .processes import descendants, freeze

pytestmark = pytest.mark.triton

ONE = (np.zeros(1, np.int32), np.zeros((1, 32, 16, 16), np.float32))
KEY = "lipsync-test"


class Restricted(EmbeddedTriton):
    """Loads and unloads only for those who know a word."""

    def _command(self, home: TritonHome, server_id: str) -> list[str]:
        return [*super()._command(home, server_id), f"--grpc-restricted-protocol=model-repository:{KEY}=word"]


@pytest.fixture(scope="module")
def models(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of its own, which tests may break: as the shared one, and a tenant whose model is no model."""
    copy = tmp_path_factory.mktemp("models") / "repository"
    shutil.copytree(repository, copy)
    shutil.copytree(repository / "plain", copy / "broken")
    config = (copy / "broken" / "config.pbtxt").read_text().replace('name: "plain"', 'name: "broken"')
    (copy / "broken" / "config.pbtxt").write_text(config)
    (copy / "broken" / "1" / "model.onnx").write_bytes(b"x" * 100)
    return copy


@pytest.fixture(scope="module")
def server(models: Path, triton_home: Path) -> Iterator[EmbeddedTriton]:
    with EmbeddedTriton(models) as server:
        yield server


@pytest.fixture
async def triton(server: EmbeddedTriton, models: Path) -> AsyncIterator[Triton]:
    """Nothing is loaded."""
    triton = Triton(TritonSettings(), server.grpc, models)
    for model in await triton.uses():
        await triton.unload(model)
    await gone(triton)
    yield triton
    await triton.close()


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    give_up_s = time.monotonic() + 30
    while not await condition():
        assert time.monotonic() < give_up_s, "it did not happen"
        await asyncio.sleep(0.02)


async def gone(triton: Triton) -> None:
    async def empty() -> bool:
        return not await triton.states()

    await eventually(empty)


async def used(triton: Triton, model: str) -> bool:
    return (await triton.uses())[model].count == 1


async def ask(triton: Triton, model: str = "plain", seconds: float = 30) -> None:
    (await triton.mouths(model, *ONE, Deadline.after(seconds))).release()


@contextlib.contextmanager
def frozen(pids: Collection[int]) -> Iterator[None]:
    """Processes stand still."""
    try:
        for pid in pids:
            freeze(pid)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


async def test_models_come_and_go(triton: Triton, server: EmbeddedTriton) -> None:
    assert server.pid is not None
    assert await triton.ping(60)
    assert await triton.uses() == {}
    before = time.time()
    for model in ("plain", "sent", "plain.raw", "audio_encoder"):
        others = descendants(server.pid)
        await triton.load(model)
        await triton.load(model)
        assert (await triton.uses())[model].last_s == 0
        await triton.warm(model)
        await eventually(partial(used, triton, model))  # Triton counts after it has answered
        assert before - 1 < (await triton.uses())[model].last_s < time.time() + 1
        assert await triton.placed(model) is None
        assert (await triton.states())[model] == "READY"
        # It cannot be gone before it was looked at.
        with frozen(descendants(server.pid) - others):
            await triton.unload(model)
            assert await triton.states() == {model: "UNLOADING"}
            assert await triton.uses() == {}
        await gone(triton)
    await triton.unload("never there")


async def test_a_model_that_is_not_loaded_is_told_apart(triton: Triton) -> None:
    for model in ("avatar", "never-there"):
        with pytest.raises(ModelNotLoaded, match=r"is not found|no available versions"):
            await ask(triton, model)
    await triton.load("plain")
    await ask(triton)
    await triton.unload("plain")
    with pytest.raises(ModelNotLoaded, match="no available versions"):
        await ask(triton)  # it is unloading
    await gone(triton)
    with pytest.raises(ModelNotLoaded, match="no available versions"):
        await ask(triton)
    with pytest.raises(ModelNotLoaded, match="not at ready state"):
        await triton._connection.ask(lambda client: client.infer("plain", [], model_version="1"))
    with pytest.raises(ModelNotLoaded):
        await triton.warm("plain")


@pytest.mark.parametrize(
    ("model", "words"), [("never-there", "failed to poll"), ("broken", "'broken' does not load into Triton: ")]
)
async def test_a_model_that_does_not_load_is_the_tenants_fault(triton: Triton, model: str, words: str) -> None:
    with pytest.raises(TenantBroken, match=words):
        await triton.load(model)
    assert await triton.states() == {}


async def test_a_model_in_memory_is_loaded_while_it_unloads(triton: Triton) -> None:
    await triton.load("plain")
    await triton.unload("plain")
    await triton.load("plain")
    await ask(triton)


def with_queue(models: Path, **policy: int) -> str:
    """The config of `plain` with requests that wait for each other, and a policy for those that wait."""
    config = text_format.Parse((models / "plain" / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    values = MessageToDict(config, preserving_proto_field_name=True)
    values["dynamic_batching"] = {
        "max_queue_delay_microseconds": 300_000,
        "preferred_batch_size": [4],
        "default_queue_policy": policy,
    }
    return json.dumps(values)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"max_queue_size": 1}, "queue for this tenant is full"),
        ({"default_timeout_microseconds": 1000}, "queue for this tenant is too long"),
    ],
)
async def test_a_full_queue_is_overload(triton: Triton, models: Path, policy: dict[str, int], words: str) -> None:
    async def load(client: Client) -> None:
        await client.load_model("plain", config=with_queue(models, **policy))

    await triton._connection.ask(load)
    refused: list[BaseException] = []

    async def crowd() -> bool:
        results = await asyncio.gather(*(ask(triton) for _ in range(3)), return_exceptions=True)
        refused.extend(result for result in results if result is not None)
        return bool(refused)

    await eventually(crowd)  # at once, unless they do not come together
    for fault in refused:
        assert isinstance(fault, Overloaded)
        assert words in fault.message
        assert fault.retry_after_s


async def test_a_placement_on_a_gpu_is_sent_and_understood(triton: Triton, models: Path) -> None:
    """There is none here: Triton refuses just that, by its number, and keeps what it had."""
    await triton.load("plain")
    with pytest.raises(TenantBroken, match=r"gpu id 1|GPUs"):
        await triton.load("plain", 1)
    await ask(triton)


async def test_a_config_that_is_sent_is_used_as_the_file_would_be(triton: Triton, models: Path) -> None:
    """But for the instances; the rest of what a placement sends is compared as Triton has understood it."""
    await triton.load("plain")
    by_file = await triton._config("plain")
    sent = json.loads(config_on((models / "plain" / "config.pbtxt").read_text(), 0) or "")
    sent["instance_group"] = [{"count": 2, "kind": "KIND_CPU"}]

    async def load(client: Client) -> None:
        await client.load_model("plain", config=json.dumps(sent))

    await triton._connection.ask(load)
    by_request = await triton._config("plain")
    assert [group.count for group in by_request.instance_group] == [2]
    for config in (by_file, by_request):
        del config.instance_group[:]
    assert by_request == by_file
    await ask(triton)


async def test_a_request_that_triton_refuses_is_a_failure(triton: Triton) -> None:
    await triton.load("plain")
    with pytest.raises(InferenceFailed, match="crop"):
        await triton.mouths("plain", np.zeros((1, 3, 328, 328), np.uint8), ONE[1], Deadline.after(30))


async def test_a_restricted_protocol_is_not_taken_for_an_outage(models: Path, triton_home: Path) -> None:
    with Restricted(models) as server:
        triton = Triton(TritonSettings(), server.grpc, models)
        assert await triton.ping(60)
        for request in (triton.load("plain"), triton.unload("plain"), triton.states()):
            with pytest.raises(KeyRefused, match=r"triton\.key_file"):
                await request
        await triton.close()


async def test_a_hung_server_holds_nobody_and_goes_on(models: Path, triton_home: Path) -> None:
    """Its requests fail when it is given up; their slots are not used again; the rest goes on as before."""
    with EmbeddedTriton(models) as server:
        triton = Triton(TritonSettings(slots=4), server.grpc, models)
        await triton.load("plain")
        await ask(triton)
        assert server.pid is not None
        freeze(server.pid)
        try:
            asking = [asyncio.create_task(ask(triton)) for _ in range(6)]
            await asyncio.wait(asking, timeout=0.2)
            triton.give_up()
            results = await asyncio.gather(*asking, return_exceptions=True)
            assert [type(result).__name__ for result in results] == ["GivenUp"] * 6
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert await triton.ping(30)
        assert (await triton.uses()).keys() == {"plain"}
        for _ in range(8):
            await ask(triton)
        assert server.restarts == 0
        await triton.close()
