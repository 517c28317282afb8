"""Models for the part `inference`: settings come in, models installed and loaded in the embedded Triton come out.

They are written straight into a repository: graph, crops and config are those of a tenant, and the compositor, which
would want a tenant's other files, does not run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tritonclient.grpc as wire
from numpy.typing import NDArray

from compositor.errors import InferenceFailed, LipsyncError
from compositor.manifest import CROPS, MODEL
from compositor.tenant import CROP_BYTES
from lipsync.fusing import fuse
from lipsync.model_config import MEMORY, Kind, tenant_config
from lipsync.triton_processes import session_members
from lipsync.tritonserver import EmbeddedTriton

_SHRINKAGE = "memory.enable_memory_arena_shrinkage"
_END_S = 30.0


@dataclass(frozen=True)
class Setting:
    """Parameters of config.pbtxt about memory, and the threads; everything else is as in an installed tenant."""

    name: str
    memory: Mapping[str, str]
    threads: int = 1


PLAIN = Setting("ONNX Runtime's defaults", {})
INSTALLED = Setting("as installed", MEMORY)
THREADS = Setting("as installed, 2 threads", MEMORY, 2)
SETTINGS = (
    PLAIN,
    INSTALLED,
    Setting("arena shrunk after each run", {_SHRINKAGE: "cpu:0"}),
    Setting("no arena", {"enable_mem_arena": "0"}),
)
GPU_SETTINGS = (
    PLAIN,
    INSTALLED,
    Setting("arena grows by what is asked for", {"arena_extend_strategy": "1"}),
    Setting("arena shrunk after each run", {_SHRINKAGE: "gpu:0"}),
)


class Subject:
    """A fused graph and its crops, from which models are installed."""

    def __init__(self, folder: Path, repository: Path, model: onnx.ModelProto, crops: int) -> None:
        """folder: for the files, on the repository's file system. model: of the avatar's interface."""
        self.crops = crops
        self._folder, self._repository = folder, repository
        folder.mkdir(parents=True)
        onnx.save(fuse(model, ("visual", "audio", "output"), crops, "resident", CROPS), folder / MODEL)
        random = np.random.default_rng(0)
        with (folder / CROPS).open("wb") as file:
            for _ in range(crops):
                file.write(random.bytes(CROP_BYTES))

    def install(self, name: str, setting: Setting, batch: int, kind: Kind) -> Path:
        """Installs a model and returns the folder of its files: links, so that memory holds each of them once."""
        version = self._repository / name / "1"
        version.mkdir(parents=True)
        for file in (MODEL, CROPS):
            os.link(self._folder / file, version / file)
        config = tenant_config(name, "resident", batch, kind, setting.threads, setting.memory)
        (version.parent / "config.pbtxt").write_text(config)
        return version


class Server:
    """Models in the embedded Triton, and one client that calls them. Raises InferenceServerException."""

    def __init__(self, triton: EmbeddedTriton) -> None:
        assert triton.keeper_pid is not None
        self.session = triton.keeper_pid
        self._client = wire.InferenceServerClient(triton.grpc)
        self._random = np.random.default_rng(0)
        self._calls = count()

    def load(self, name: str) -> int:
        """Loads a model; returns the pid of its backend process."""
        self._client.load_model(name)
        instance = f"{name}_0_0".encode()
        for pid in session_members(self.session):
            if instance in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return pid
        raise LipsyncError(f"the model {name!r} is loaded, but has no backend process of its own")

    def infer(self, name: str, batch: int, crops: int) -> None:
        """One request of `batch` frames: the next ones of all `crops`, with audio drawn at random."""
        numbers = (np.arange(batch) + next(self._calls) * batch) % crops
        inputs = [
            _tensor("frame_index", numbers.astype(np.int32).reshape(-1, 1), "INT32"),
            _tensor("audio", self._random.standard_normal((batch, 32, 16, 16), np.float32), "FP32"),
        ]
        if not self._client.infer(name, inputs).as_numpy("finite").all():
            raise InferenceFailed(f"the model {name!r} predicted NaN")

    def unload(self, names: Iterable[str], pids: Iterable[int]) -> None:
        """Unloads models and waits until their processes have ended: only then is their memory free."""
        for name in names:
            self._client.unload_model(name)
        ending, deadline = set(pids), time.monotonic() + _END_S
        while ending & set(session_members(self.session)):
            if time.monotonic() > deadline:
                raise LipsyncError(f"a model's process did not end within {_END_S:.0f} s of its unloading")
            time.sleep(0.05)

    def close(self) -> None:
        """Ends the connection; Triton goes on."""
        self._client.close()


def _tensor(name: str, values: NDArray[Any], datatype: str) -> wire.InferInput:
    tensor = wire.InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values)
    return tensor
