"""What is said about models; that Triton understands it is tested in tests/integration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from compositor.errors import LipsyncError, TenantBroken
from compositor.residency.models import OutOfMemory, Use
from compositor.settings import TritonSettings
from compositor.triton.connection import ModelNotLoaded, NoAnswer, Unresponsive
from compositor.triton.control import Control, config_on
from lipsync.model_config import encoder_config, tenant_config

from .kserve import serving

CONFIG = tenant_config("t", "resident", 4, "auto", 2)


def test_the_gpu_is_all_that_a_placement_changes() -> None:
    here, there = (json.loads(config_on(CONFIG, gpu) or "") for gpu in (0, 3))
    assert here["instance_group"] == [{"count": 1, "kind": "KIND_GPU", "gpus": [0]}]
    assert there["instance_group"] == [{"count": 1, "kind": "KIND_GPU", "gpus": [3]}]
    assert {**here, "instance_group": []} == {**there, "instance_group": []}
    assert (here["name"], here["backend"], here["max_batch_size"]) == ("t", "onnxruntime", 4)
    assert here["default_model_filename"] == "model.onnx"
    assert here["version_policy"] == {"specific": {"versions": ["1"]}}
    assert here["dynamic_batching"] == {}
    assert here["parameters"]["intra_op_thread_count"] == {"string_value": "2"}
    assert [tensor["name"] for tensor in here["input"] + here["output"]] == ["frame_index", "audio", "mouth", "finite"]


def test_a_config_without_instances_gets_some() -> None:
    assert json.loads(config_on('name: "t"', 1) or "")["instance_group"] == [{"kind": "KIND_GPU", "gpus": [1]}]


def test_what_is_made_for_the_cpu_stays_there() -> None:
    assert config_on(tenant_config("t", "resident", 4, "cpu", 2), 1) is None
    assert config_on(encoder_config("e", "gpu"), 1) is not None


@pytest.mark.parametrize("text", [None, "name: ", 'nonsense: "t"', "\udcff"])
async def test_a_config_that_cannot_be_read_is_the_tenants_fault(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "t").mkdir()
    if text is not None:
        (tmp_path / "t" / "config.pbtxt").write_text(text, encoding="utf-8", errors="surrogateescape")
    control = Control(TritonSettings(), "127.0.0.1:1", tmp_path)
    with pytest.raises(TenantBroken, match=r"config\.pbtxt of 't'"):
        await control.load("t", 0)
    with pytest.raises(ValueError, match="needs the model repository"):
        await Control(TritonSettings(), "127.0.0.1:1").load("t", 0)


class Refusing:
    """Stands for a connection whose every request Triton refuses with this message."""

    def __init__(self, *_: object, **__: object) -> None: ...

    message = ""

    async def load_model(self, *_: object, **__: object) -> None:
        raise InferenceServerException(self.message, "StatusCode.INTERNAL")


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("failed to poll from model repository", TenantBroken),
        (
            "onnx runtime error 6: ... BFCArena ... Failed to allocate memory for requested buffer of size 1",
            OutOfMemory,
        ),
        ("CUDA failure 2: out of memory ; GPU=0", OutOfMemory),
        ("CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED", OutOfMemory),
        ("std::bad_alloc", OutOfMemory),
        ("Internal: MemoryError: Unable to allocate 99 GiB", OutOfMemory),
        ("Unable to initialize shared memory key: No space left on device, use the --shm-size flag", OutOfMemory),
        ("load failed for model 'bad_alloc': version 1 is at UNAVAILABLE state", TenantBroken),
    ],
)
async def test_loads_without_memory_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, message: str, kind: type[LipsyncError]
) -> None:
    monkeypatch.setattr("tritonclient.grpc.aio.InferenceServerClient", Refusing)
    monkeypatch.setattr(Refusing, "message", message)
    with pytest.raises(kind, match="'bad_alloc' does not load into Triton: ") as caught:
        await Control(TritonSettings(), "127.0.0.1:1").load("bad_alloc")
    assert type(caught.value) is kind
    assert message in caught.value.message


@pytest.mark.parametrize(
    "message",
    [
        "instance group t_0 of model t specifies invalid or unsupported gpu id 7. GPUs with at least ... are: 0 1 ;\n",
        "instance group t_0 of model t has kind KIND_GPU but no GPUs are available;\n",
    ],
)
async def test_a_gpu_that_is_not_there_names_the_setting_that_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "config.pbtxt").write_text(CONFIG)
    monkeypatch.setattr("tritonclient.grpc.aio.InferenceServerClient", Refusing)
    monkeypatch.setattr(Refusing, "message", message)
    control = Control(TritonSettings(), "127.0.0.1:1", tmp_path)
    with pytest.raises(TenantBroken, match=r"triton\.gpus names GPU 7, which 127\.0\.0\.1:1 does not have") as caught:
        await control.load("t", 7)
    assert (caught.value.field, caught.value.message.count("\n")) == ("triton.gpus", 0)
    # Where config.pbtxt names it, no setting is to blame.
    with pytest.raises(TenantBroken, match="'t' does not load into Triton: instance group"):
        await control.load("t")


async def test_a_server_tells_of_its_models() -> None:
    async with serving() as kserve:
        control = Control(TritonSettings(), kserve.endpoint)
        await control.load("m")
        await control.warm("m")
        assert (control.inferred, control.slowest_s) == (1, 0)
        assert await control.states() == {"m": "READY"}
        assert await control.uses() == {"m": Use(1, 0.0)}
        assert await control.placed("m") is None
        await control.unload("m")
        assert await control.states() == {}
        await control._connection.close()


async def test_a_model_that_is_not_loaded_is_on_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    control = Control(TritonSettings(), "127.0.0.1:1")

    async def missing(model: str) -> None:
        raise ModelNotLoaded("gone")

    monkeypatch.setattr(control, "_config", missing)
    assert await control.placed("m") is None
    with pytest.raises(ModelNotLoaded):
        await control.gpus("m")


@pytest.mark.parametrize(
    ("groups", "gpus"),
    [("", []), ("{kind: KIND_CPU}", []), ("{gpus: [1, 0]}", [0, 1]), ("{gpus: [2]}, {gpus: [2]}, {gpus: [5]}", [2, 5])],
)
async def test_a_model_is_on_the_gpus_of_all_its_instances(
    monkeypatch: pytest.MonkeyPatch, groups: str, gpus: list[int]
) -> None:
    control = Control(TritonSettings(), "127.0.0.1:1")

    async def config(model: str) -> model_config_pb2.ModelConfig:
        return text_format.Parse(f"instance_group [{groups}]", model_config_pb2.ModelConfig())

    monkeypatch.setattr(control, "_config", config)
    assert await control.gpus("m") == gpus
    assert await control.placed("m") == (gpus[0] if gpus else None)


async def test_a_server_that_says_nothing_of_its_models_is_at_fault_and_not_the_caller() -> None:
    async with serving() as kserve:
        control = Control(TritonSettings(timeout_s=0.05, load_timeout_s=0.05), kserve.endpoint)
        kserve.go.clear()
        for question in (control.uses(), control.states(), control.placed("m"), control.unload("m"), control.warm("m")):
            with pytest.raises(Unresponsive) as caught:
                await question
            assert caught.value.retry_after_s
        with pytest.raises(NoAnswer):
            await control.load("m")
        await control._connection.close()
