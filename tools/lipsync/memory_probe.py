"""The child process that runs a model as Triton's backend process will: one request (JSON) in argv, one report (JSON)
on standard output, with the memory that is this process's own by then.

It loads nothing that a backend process does not, so that its memory is such a one's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lipsync.model_probe import serve


def main() -> None:
    """Answers the request in argv[1]."""
    serve(answer)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """{"private_bytes": what the process takes once a full batch has run}, or {"refused": why none does."""
    # Late, so that the limits hold for the imports of native code too.
    import numpy as np
    import onnxruntime

    types = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(uint8)": np.uint8}
    try:
        options = _options(onnxruntime.SessionOptions(), request["parameters"])
        session = onnxruntime.InferenceSession(request["path"], options, providers=["CPUExecutionProvider"])
        feed = {
            node.name: np.zeros((request["batch"], *node.shape[1:]), types[node.type]) for node in session.get_inputs()
        }
        # The first full batch makes ONNX Runtime's arena as large as it gets.
        session.run(None, feed)
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    return {"private_bytes": _private_bytes()}


def _options(options: Any, parameters: dict[str, str]) -> Any:
    """ONNX Runtime's options by the parameters of config.pbtxt that the project writes."""
    options.log_severity_level = 4
    options.intra_op_num_threads = int(parameters["intra_op_thread_count"])
    options.inter_op_num_threads = int(parameters["inter_op_thread_count"])
    options.enable_mem_pattern = parameters.get("enable_mem_pattern", "1") == "1"
    options.enable_cpu_mem_arena = parameters.get("enable_mem_arena", "1") == "1"
    return options


def _private_bytes() -> int:
    """Anonymous memory, nobody else's (proc(5), status): mapped files are not in it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


if __name__ == "__main__":
    main()
