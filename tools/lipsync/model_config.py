"""config.pbtxt of the models that the project installs: complete, so that Triton completes nothing by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from compositor.catalogue import MEMORY_PARAMETER
from compositor.features import ENCODER_BATCH

if TYPE_CHECKING:
    from .fusing import CropsMode

Kind = Literal["auto", "cpu", "gpu"]

TENANT_BATCH = 4
"""Default max_batch_size of a tenant. Each frame of the batch takes about 165 MB for good with the true graph, which on
a CPU saves no time by it (`lipsync bench inference`). What surrounds the model does: a third of the CPU in Triton where
requests carry four frames and not one (`lipsync bench live`), and a quarter of the calls."""

MEMORY: Mapping[str, str] = {"enable_mem_pattern": "0"}
"""ONNX Runtime's memory settings, by the names that both backends know. Memory patterns take 60 MB more a frame of the
batch and save no time. The arena stays, as large as the largest batch made it: without it, or given back after each
run, a frame takes half as much CPU time again, for the kernel clears the same pages for each run."""


def session_parameters(threads: int, memory: Mapping[str, str] = MEMORY) -> dict[str, str]:
    """What config.pbtxt says of a model's ONNX Runtime session."""
    return {"intra_op_thread_count": str(threads), "inter_op_thread_count": "1", **memory}


def tenant_config(
    name: str,
    mode: CropsMode,
    max_batch_size: int,
    kind: Kind,
    threads: int,
    memory: Mapping[str, str] = MEMORY,
    measured_bytes: int = 0,
) -> str:
    """Of a fused tenant. memory: parameters about memory, in place of the usual ones. measured_bytes: what its process
    takes, where that was measured; so for the others."""
    subject = ("frame_index", "INT32", [1]) if mode == "resident" else ("crop", "UINT8", [3, 328, 328])
    return _config(
        name,
        max_batch_size,
        inputs=[subject, ("audio", "FP32", [32, 16, 16])],
        outputs=[("mouth", "UINT8", [3, 328, 328]), ("finite", "BOOL", [1])],
        kind=kind,
        parameters=session_parameters(threads, memory),
        measured_bytes=measured_bytes,
    )


def raw_config(name: str, max_batch_size: int, kind: Kind, threads: int, measured_bytes: int = 0) -> str:
    """Of an uploaded graph, served as it is."""
    return _config(
        name,
        max_batch_size,
        inputs=[("visual", "FP32", [6, 320, 320]), ("audio", "FP32", [32, 16, 16])],
        outputs=[("output", "FP32", [3, 320, 320])],
        kind=kind,
        parameters=session_parameters(threads),
        measured_bytes=measured_bytes,
    )


def encoder_config(name: str, kind: Kind = "auto", threads: int = 1, measured_bytes: int = 0) -> str:
    """Of an audio encoder."""
    return _config(
        name,
        ENCODER_BATCH,
        inputs=[("mel_spectrogram", "FP32", [1, 80, 16])],
        outputs=[("audio_features", "FP32", [512])],
        kind=kind,
        parameters=session_parameters(threads),
        measured_bytes=measured_bytes,
    )


def _config(
    name: str,
    max_batch_size: int,
    inputs: list[tuple[str, str, list[int]]],
    outputs: list[tuple[str, str, list[int]]],
    kind: Kind,
    parameters: Mapping[str, str],
    measured_bytes: int,
) -> str:
    def tensors(field: str, values: list[tuple[str, str, list[int]]]) -> str:
        lines = [
            f'  {{ name: "{tensor}" data_type: TYPE_{datatype} dims: {dims} }}' for tensor, datatype, dims in values
        ]
        return f"{field} [\n" + ",\n".join(lines) + "\n]\n"

    if measured_bytes:
        parameters = {**parameters, MEMORY_PARAMETER: str(measured_bytes)}
    return (
        f'# Made by `lipsync`; changes are lost when the model is installed again.\nname: "{name}"\n'
        f'backend: "onnxruntime"\ndefault_model_filename: "model.onnx"\nmax_batch_size: {max_batch_size}\n'
        + tensors("input", inputs)
        + tensors("output", outputs)
        + f"instance_group [ {{ count: 1 kind: KIND_{kind.upper()} }} ]\n"
        + "version_policy: { specific: { versions: [ 1 ] } }\n"
        # No queue policy: with one, whatever its values, 2 to 4 % of calls stalled for 500 ms (Triton 24.10; without,
        # 0 of 500). The compositor bounds what is in flight, and each request's time.
        + "dynamic_batching { }\n"
        + "".join(
            f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n' for key, value in parameters.items()
        )
    )
