"""A Triton whose inference fails, or hangs, while it answers pings."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lipsync.tritonserver import EmbeddedTriton, TritonHome


class FailingTriton(EmbeddedTriton):
    """A real Triton whose inference can be made to fail or to hang; it answers pings all the same."""

    def __init__(self, repository: Path, folder: Path) -> None:
        """folder: for its backends; it is made."""
        super().__init__(repository)
        self._backends = folder

    def _command(self, home: TritonHome, server_id: str) -> list[str]:
        # It is there already where a port was taken, and this is another try.
        shutil.copytree(home.backends, self._backends, dirs_exist_ok=True)
        backend = self._backends / "onnxruntime"
        (backend / "model.py").rename(backend / "backend.py")
        shutil.copy(Path(__file__).with_name("failing_backend.py"), backend / "model.py")
        self.fail()
        self.hang()
        return super()._command(replace(home, backends=self._backends), server_id)

    def fail(self, *models: str) -> None:
        """From now on, inferences of these models fail, and no others; `*`: of all."""
        self._write("fails", models)

    def hang(self, *models: str) -> None:
        """From now on, inferences of these models are not answered, and those of all others are."""
        self._write("hangs", models)

    def has_hung(self, model: str) -> bool:
        """Whether an inference of the model has begun that was not answered."""
        return (self._backends / "onnxruntime" / f"{model}.hung").exists()

    def _write(self, name: str, models: Sequence[str]) -> None:
        new = self._backends / "onnxruntime" / f"{name}.new"
        new.write_text("\n".join(models))
        new.rename(new.with_name(name))
