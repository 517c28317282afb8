"""Measures what a model takes while it is loaded: the files that are to be served go in, bytes come out.

Residency reckons with that figure, so it is that of a whole backend process after a full batch, under the session
options of config.pbtxt, and no estimate from a file's size.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compositor.errors import InvalidInput
from lipsync.model_check import DEFAULT_MEMORY_LIMIT_BYTES, DEFAULT_TIMEOUT_S
from lipsync.model_interface import one_line
from lipsync.probe_child import run_child

_log = logging.getLogger(__name__)


class _Report(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    refused: str | None = None
    private_bytes: int = Field(0, ge=0)


def backend_bytes(
    path: Path,
    batch: int,
    parameters: Mapping[str, str],
    *,
    memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> int:
    """Private memory of a process that serves the ONNX file at `path` on a CPU, bytes, after a run of `batch` rows.

    parameters: those of its config.pbtxt. What the process maps, as a tenant's crops, is not in it. Raises InvalidInput
    where the model does not run so.
    """
    request = {
        "path": os.fspath(path.absolute()),
        "batch": batch,
        "parameters": dict(parameters),
        "threads": int(parameters["intra_op_thread_count"]) or os.cpu_count() or 1,
        "memory_limit_bytes": memory_limit_bytes,
        "timeout_s": timeout_s,
    }
    ended = run_child("lipsync.memory_probe", request, timeout_s)
    if ended.said:
        _log.debug("measuring the memory of %s said: %s", path, one_line(ended.said))
    try:
        report = _Report.model_validate_json(ended.written)
    except ValidationError:
        why = f"it took longer than {timeout_s:g} s" if ended.code is None else f"its process ended with {ended.code}"
        raise _refusal(batch, why) from None
    if not report.private_bytes:
        raise _refusal(batch, report.refused or "no figure was given")
    return report.private_bytes


def _refusal(batch: int, why: str) -> InvalidInput:
    return InvalidInput(
        f"the model does not run as it is to be served, at a batch of {batch} ({one_line(why, 300)}); "
        "use a smaller --max-batch-size, or export it again with opset 17",
        field="model",
    )
