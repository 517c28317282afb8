"""Checks an uploaded model: a path comes in, what is known of the model or one clear refusal goes out.

The file is a stranger's. A child process under limits parses and runs it (`model_probe`); this side believes nothing
but the child's report, and reads the file itself only once it is known to be the one that passed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import onnx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compositor.errors import InvalidInput
from lipsync.model_interface import (
    AVATAR,
    DEFAULT_LIMIT_BYTES,
    ENCODER,
    MAX_IR_VERSION,
    MAX_OPSET,
    MIN_OPSET,
    TENSOR_NAME_PATTERN,
    AvatarModel,
    EncoderModel,
    Interface,
    UploadedModel,
    one_line,
)
from lipsync.model_rules import make_dynamic
from lipsync.probe_child import run_child

_log = logging.getLogger(__name__)

# ONNX Runtime takes 165-230 MB a frame of the batch at full width; 4 frames and room for larger models.
DEFAULT_MEMORY_LIMIT_BYTES = 8 << 30
DEFAULT_TIMEOUT_S = 120.0
_NO_NAMES: Mapping[str, str] = {}


@dataclass(frozen=True)
class ProbeResult:
    """A model that ran. `seconds_per_frame` is wall time at the probed batch; `peak_rss_bytes` is the whole child's."""

    model: UploadedModel
    batch: int
    threads: int
    seconds_per_frame: float
    peak_rss_bytes: int


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


_Name = Annotated[str, Field(pattern=TENSOR_NAME_PATTERN)]


class _ModelReport(_Strict):
    inputs: list[_Name] = Field(min_length=1, max_length=2)
    output: _Name
    opset: int = Field(ge=MIN_OPSET, le=MAX_OPSET)
    ir: int = Field(ge=1, le=MAX_IR_VERSION)
    batch: Literal["dynamic", "fixed"]
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=1)


class _ProbeReport(_Strict):
    seconds_per_frame: float = Field(gt=0, allow_inf_nan=False)
    peak_rss_bytes: int = Field(gt=0)


class _Report(_Strict):
    refused: str | None = None
    model: _ModelReport | None = None
    probe: _ProbeReport | None = None


def inspect(path: Path, *, names: Mapping[str, str] = _NO_NAMES, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> AvatarModel:
    """Checks an avatar model without running it, in a child process.

    `names` maps roles (visual, audio, output) to tensor names where several tensors fit a role. Raises InvalidInput,
    one line 'avatar model: FILE, fault; remedy'.
    """
    report = _ask(path, AVATAR, names, limit_bytes=limit_bytes)
    return AvatarModel(**_fields(report))


def inspect_encoder(
    path: Path, *, names: Mapping[str, str] = _NO_NAMES, limit_bytes: int = DEFAULT_LIMIT_BYTES
) -> EncoderModel:
    """`inspect` for an audio encoder; the roles are mel and features."""
    report = _ask(path, ENCODER, names, limit_bytes=limit_bytes)
    return EncoderModel(**_fields(report))


def probe(
    model_path: Path,
    batch: int,
    *,
    interface: Interface = AVATAR,
    names: Mapping[str, str] = _NO_NAMES,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
    memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    threads: int = 1,
) -> ProbeResult:
    """Checks a model as `inspect` does, then runs it in the same child, alone and at `batch` (>= 1), on `threads`
    threads.

    The model has its batch axis made dynamic first, as `load_dynamic` does. Refused, as InvalidInput: an output that is
    not finite, of another shape or far outside [0,1]; rows that depend on their batch; a crash; more memory or time
    than allowed. Inspecting before is not needed: the result carries the model.
    """
    if batch < 1:
        raise InvalidInput(f"batch: {batch} is below 1; give the batch size that is to be served", field="batch")
    report = _ask(
        model_path,
        interface,
        names,
        limit_bytes=limit_bytes,
        batch=batch,
        threads=threads,
        memory_limit_bytes=memory_limit_bytes,
        timeout_s=timeout_s,
    )
    if report.probe is None:
        raise _nonsense(interface, model_path)
    kind = AvatarModel if interface.kind == "avatar" else EncoderModel
    return ProbeResult(
        model=kind(**_fields(report)),
        batch=batch,
        threads=threads,
        seconds_per_frame=report.probe.seconds_per_frame,
        peak_rss_bytes=report.probe.peak_rss_bytes,
    )


def load_dynamic(path: Path, model: UploadedModel) -> onnx.ModelProto:
    """The checked file as a graph with a symbolic batch axis, its nodes and weights as uploaded.

    Raises InvalidInput where the file is not the one that was checked: it is parsed only after its digest is known.
    """
    interface = ENCODER if isinstance(model, EncoderModel) else AVATAR
    try:
        data = path.read_bytes() if path.stat().st_size == model.size_bytes else b""
    except OSError as error:
        raise interface.refusal(str(path), f"cannot be read ({error.strerror})", "give an ONNX file") from None
    if hashlib.sha256(data).hexdigest() != model.sha256:
        raise interface.refusal(str(path), "it changed after it was checked", "start again when the file is complete")
    graph = onnx.load_model_from_string(data)
    make_dynamic(graph, model, interface)
    return graph


def _fields(report: _Report) -> dict[str, Any]:
    assert report.model is not None
    fields = report.model.model_dump()
    return {**fields, "inputs": tuple(fields["inputs"])}


def _ask(
    path: Path,
    interface: Interface,
    names: Mapping[str, str],
    *,
    limit_bytes: int,
    batch: int = 0,
    threads: int = 1,
    memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> _Report:
    """The child's report on `path`; a refusal in it, or no report, raises InvalidInput. `batch` 0 only inspects."""
    request = {
        "kind": interface.kind,
        "path": os.fspath(path.absolute()),
        "names": dict(names),
        "limit_bytes": limit_bytes,
        "batch": batch,
        "threads": threads,
        "memory_limit_bytes": memory_limit_bytes,
        "timeout_s": timeout_s,
    }
    ended = run_child("lipsync.model_probe", request, timeout_s)
    if ended.said:
        _log.debug("the check of %s said: %s", path, one_line(ended.said))
    if ended.code != 0:
        raise interface.refusal(os.fspath(path), *_reason(ended.code, timeout_s, ended.said))
    try:
        report = _Report.model_validate_json(ended.written)
    except ValidationError:
        raise _nonsense(interface, path) from None
    if report.refused is not None:
        raise InvalidInput(one_line(report.refused), field="model")
    if report.model is None or len(report.model.inputs) != len(interface.inputs):
        raise _nonsense(interface, path)
    return report


def _reason(code: int | None, timeout_s: float, said: str) -> tuple[str, str]:
    """Fault and remedy for a child that ended without a report."""
    if code is None or code in (-signal.SIGXCPU, -signal.SIGALRM):
        return f"checking it took longer than {timeout_s:g} s", "use a smaller model or batch, or allow more time"
    if code == -signal.SIGKILL:
        return "the check was killed, most likely because the machine ran out of memory", "use a smaller model or batch"
    if "MemoryError" in said or "bad_alloc" in said:
        return "checking it took more memory than allowed", "use a smaller model or batch, or allow more memory"
    if code < 0:
        return f"it crashes ONNX Runtime ({signal.strsignal(-code)})", "export it again with opset 17"
    last = (said.strip().splitlines() or ["no reason given"])[-1]
    return f"the check failed ({last[-200:]})", "try again, then export it again with opset 17"


def _nonsense(interface: Interface, path: Path) -> InvalidInput:
    return interface.refusal(os.fspath(path), "the check answered nonsense", "export it again with opset 17")
