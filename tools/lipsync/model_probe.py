"""The child process that meets a stranger's model: one request (JSON) in argv, one report (JSON) on standard output.

It parses, checks and runs the model on the CPU under limits that it first puts on itself. Parsing and running are where
a hostile file would attack, so the parent (`model_check`) reads nothing but the report.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compositor.errors import LipsyncError
from lipsync.model_interface import INTERFACES, Interface, UploadedModel

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# The report and stray messages of native libraries go to files; nothing else is written.
_REPORT_LIMIT_BYTES = 1 << 20
_TOLERANCE = 1e-3
_COMPARED_ROWS = 3
_OUT_OF_MEMORY = ("bad_alloc", "bad alloc", "Failed to allocate memory", "cannot allocate memory")
_DYNAMIC_AXES = "export with dynamic_axes naming axis 0 of every input and output"


def main() -> None:
    """Answers the request in argv[1]."""
    serve(answer)


def serve(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers the request in argv[1] by `work`, under the limits that it names. Standard output is given to the report
    alone: what native code prints goes to standard error."""
    report_fd = os.dup(1)
    os.dup2(2, 1)
    request = json.loads(sys.argv[1])
    _limit_self(request["memory_limit_bytes"], request["timeout_s"], request["threads"])
    report = work(request)
    with os.fdopen(report_fd, "w", encoding="ascii") as pipe:
        json.dump(report, pipe)


def _limit_self(memory_bytes: int, timeout_s: float, threads: int) -> None:
    """Limits memory, CPU, wall clock and files. RLIMIT_DATA, because RLIMIT_AS counts what runtimes only reserve."""
    seconds = max(1, int(timeout_s))
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    cpu_s = seconds * (threads + 1)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_REPORT_LIMIT_BYTES, _REPORT_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Ends an orphan whose parent was killed before it could.
    signal.alarm(seconds * 2)
    # Where the host runs out of memory after all, this process goes first, not its parent.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """{"model": ...} after inspection, with "probe" where a batch was asked for, or {"refused": one line}."""
    interface, path = INTERFACES[request["kind"]], request["path"]
    try:
        return _answer(interface, path, request)
    except LipsyncError as error:
        return {"refused": error.message}
    except MemoryError:
        return {"refused": _needs_memory(interface, path, request["memory_limit_bytes"]).message}


def _answer(interface: Interface, path: str, request: dict[str, Any]) -> dict[str, Any]:
    data = _read(interface, path, request["limit_bytes"])
    # Late, so that the limits hold for the imports of native code too.
    from lipsync.model_rules import Rules, make_dynamic

    found, model = Rules(interface, path).examine(data, request["names"])
    report: dict[str, Any] = {"model": vars(found)}
    if request["batch"]:
        make_dynamic(model, found, interface)
        data = model.SerializeToString()
        del model
        report["probe"] = _Probe(interface, path, found, request).measure(data)
    return report


def _read(interface: Interface, path: str, limit_bytes: int) -> bytes:
    try:
        # O_NONBLOCK: opening a pipe must not wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise interface.refusal(path, f"cannot be read ({error.strerror})", "give an ONNX file") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise interface.refusal(path, "not a file", "give an ONNX file")
    if status.st_size > limit_bytes:
        fault = f"{status.st_size:,} bytes are more than the limit of {limit_bytes:,}"
        raise interface.refusal(path, fault, "the real model has about 49 MB: is this the right file?")
    with os.fdopen(fd, "rb") as file:
        return file.read(limit_bytes)


def _needs_memory(interface: Interface, path: str, limit_bytes: int) -> LipsyncError:
    fault = f"it needs more than {limit_bytes / 2**20:,.0f} MiB of memory"
    return interface.refusal(path, fault, "probe a smaller batch, raise the memory limit, or use a smaller model")


class _Probe:
    """Runs one model on random input: single rows, then the whole batch, twice."""

    def __init__(self, interface: Interface, path: str, found: UploadedModel, request: dict[str, Any]) -> None:
        self._interface = interface
        self._path = path
        self._found = found
        self._batch: int = request["batch"]
        self._threads: int = request["threads"]
        self._memory_limit_bytes: int = request["memory_limit_bytes"]

    def measure(self, data: bytes) -> dict[str, Any]:
        import numpy as np
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise self._failed(error, "ONNX Runtime does not load it", "export it again with opset 17") from None

        random = np.random.default_rng(0)
        feed = {
            name: random.uniform(spec.low, spec.high, (self._batch, *spec.shape)).astype(np.float32)
            for name, spec in zip(self._found.inputs, self._interface.inputs, strict=True)
        }
        rows = sorted({0, self._batch // 2, self._batch - 1})[:_COMPARED_ROWS]
        singles = [
            self._run(session, {name: value[row : row + 1] for name, value in feed.items()}, 1)[0] for row in rows
        ]
        together = self._run(session, feed, self._batch)
        for row, single in zip(rows, singles, strict=True):
            if not np.allclose(together[row], single, atol=_TOLERANCE, rtol=_TOLERANCE):
                fault = f"row {row} of a batch of {self._batch} differs from the same row alone"
                raise self._refusal(fault, _DYNAMIC_AXES)
        began = time.perf_counter()
        self._run(session, feed, self._batch)
        return {"seconds_per_frame": (time.perf_counter() - began) / self._batch, "peak_rss_bytes": _peak_rss_bytes()}

    def _run(self, session: Any, feed: dict[str, npt.NDArray[np.float32]], batch: int) -> npt.NDArray[np.float32]:
        """One run, its output checked: float32, the right shape, finite, within bounds."""
        import numpy as np

        try:
            (output,) = session.run([self._found.output], feed)
        except Exception as error:
            raise self._failed(error, f"it fails at batch {batch}", _DYNAMIC_AXES) from None
        spec = self._interface.output
        shape = tuple(getattr(output, "shape", ()))
        if shape != (batch, *spec.shape) or output.dtype != np.float32:
            fault = f"at batch {batch} it answers {getattr(output, 'dtype', type(output).__name__)} {list(shape)}"
            raise self._refusal(f"{fault} instead of float32 {[batch, *spec.shape]}", _DYNAMIC_AXES)
        if not np.isfinite(output).all():
            raise self._refusal("it answers NaN or infinity to ordinary input", "export the trained weights again")
        if self._interface.bounds is not None:
            low, high = self._interface.bounds
            if output.min() < low or output.max() > high:
                fault = f"its output ranges from {output.min():.3g} to {output.max():.3g}"
                raise self._refusal(fault, "outputs must be sigmoid in [0,1]: export with the final sigmoid")
        checked: npt.NDArray[np.float32] = output
        return checked

    def _failed(self, error: Exception, fault: str, remedy: str) -> LipsyncError:
        reason = str(error).strip()
        if isinstance(error, MemoryError) or any(sign in reason for sign in _OUT_OF_MEMORY):
            return _needs_memory(self._interface, self._path, self._memory_limit_bytes)
        return self._refusal(f"{fault} ({(reason.splitlines() or ['no reason given'])[0][:300]})", remedy)

    def _refusal(self, fault: str, remedy: str) -> LipsyncError:
        return self._interface.refusal(self._path, fault, remedy)


def _peak_rss_bytes() -> int:
    """This process's own high-water mark; getrusage's would include what the parent had at the fork."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
