"""config.pbtxt as Triton's own definition reads it: complete, so that Triton completes nothing by itself."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton

from compositor.features import ENCODER_BATCH
from lipsync import model_config
from lipsync.fusing import CropsMode
from lipsync.model_config import Kind

Tensors = dict[str, tuple[str, list[int]]]


def parsed(text: str) -> Any:
    return text_format.Parse(text, triton.ModelConfig())


def tensors(side: Any) -> Tensors:
    return {tensor.name: (triton.DataType.Name(tensor.data_type), list(tensor.dims)) for tensor in side}


def check_common(config: Any, name: str, batch: int, kind: str, threads: int) -> None:
    assert (config.name, config.backend, config.max_batch_size) == (name, "onnxruntime", batch)
    assert config.default_model_filename == "model.onnx"
    (group,) = config.instance_group
    assert (group.count, triton.ModelInstanceGroup.Kind.Name(group.kind)) == (1, kind)
    assert list(config.version_policy.specific.versions) == [1]
    assert config.HasField("dynamic_batching")
    assert not config.dynamic_batching.HasField("default_queue_policy")
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    values = {key: value.string_value for key, value in config.parameters.items()}
    assert values == {"intra_op_thread_count": str(threads), "inter_op_thread_count": "1", "enable_mem_pattern": "0"}


@pytest.mark.parametrize("kind", ["auto", "cpu", "gpu"])
@pytest.mark.parametrize(
    ("mode", "subject"),
    [("resident", ("frame_index", "TYPE_INT32", [1])), ("sent", ("crop", "TYPE_UINT8", [3, 328, 328]))],
)
def test_a_tenants(mode: CropsMode, subject: tuple[str, str, list[int]], kind: Kind) -> None:
    config = parsed(model_config.tenant_config("anna-1", mode, 3, kind, 5))
    check_common(config, "anna-1", 3, f"KIND_{kind.upper()}", 5)
    assert tensors(config.input) == {subject[0]: subject[1:], "audio": ("TYPE_FP32", [32, 16, 16])}
    assert tensors(config.output) == {"mouth": ("TYPE_UINT8", [3, 328, 328]), "finite": ("TYPE_BOOL", [1])}


def test_memory_settings_take_the_place_of_the_usual_ones() -> None:
    config = parsed(model_config.tenant_config("anna", "resident", 1, "cpu", 1, {"enable_mem_arena": "0"}))
    values = {key: value.string_value for key, value in config.parameters.items()}
    assert values == {"intra_op_thread_count": "1", "inter_op_thread_count": "1", "enable_mem_arena": "0"}


def test_a_raw_models() -> None:
    config = parsed(model_config.raw_config("anna.raw", 4, "cpu", 2))
    check_common(config, "anna.raw", 4, "KIND_CPU", 2)
    assert tensors(config.input) == {"visual": ("TYPE_FP32", [6, 320, 320]), "audio": ("TYPE_FP32", [32, 16, 16])}
    assert tensors(config.output) == {"output": ("TYPE_FP32", [3, 320, 320])}


def test_an_encoders() -> None:
    config = parsed(model_config.encoder_config("audio_encoder"))
    check_common(config, "audio_encoder", ENCODER_BATCH, "KIND_AUTO", 1)
    assert tensors(config.input) == {"mel_spectrogram": ("TYPE_FP32", [1, 80, 16])}
    assert tensors(config.output) == {"audio_features": ("TYPE_FP32", [512])}
