"""The project's backend, whose inferences fail as on a GPU that fell off its bus, or hang, for the models that the
files `fails` and `hangs` beside it name, a line each; `*`: for all. What has hung leaves a file `<model>.hung` there.
Takes the backend's place in a test's folder."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("backend", HERE / "backend.py")
assert _spec is not None
assert _spec.loader is not None
_backend = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_backend)


class TritonPythonModel(_backend.TritonPythonModel):  # type: ignore[name-defined,misc]
    """One model instance."""

    def initialize(self, args: dict[str, str]) -> None:
        self.name = args["model_name"]
        super().initialize(args)

    def execute(self, requests: list[Any]) -> list[Any]:
        while self._is_in("hangs"):
            (HERE / f"{self.name}.hung").touch()
            time.sleep(0.01)
        if self._is_in("fails"):
            error = pb_utils.TritonError("onnxruntime execute failure: CUDA failure 999: unknown error ; GPU=0")
            return [pb_utils.InferenceResponse(output_tensors=[], error=error) for _ in requests]
        answers: list[Any] = super().execute(requests)
        return answers

    def _is_in(self, file: str) -> bool:
        return not {self.name, "*"}.isdisjoint((HERE / file).read_text().split())
