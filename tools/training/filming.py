"""The whole service with one avatar in it: models and drawn frames go in as a tenant's do, and for speech that is sent
as a WAV the frames come back that viewers get. A real Triton and the compositor as a process of its own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import onnxruntime

from compositor import jpeg
from compositor.audio import Samples
from compositor.blending import Pixels
from compositor.manifest import AUDIO_ENCODER, MODEL
from compositor.proto import lipsync_v1_pb2 as pb
from lipsync.architecture import AUDIO_SHAPE, MEL_SHAPE
from lipsync.avatar import write_source
from lipsync.bench.service import running
from lipsync.client import speak
from lipsync.preparation import Choices, Report
from lipsync.repository import Serving, add_encoder, add_tenant
from lipsync.sources import open_source
from lipsync.tritonserver import EmbeddedTriton
from training.takes import wav

TENANT: Final = "demo"
BATCH: Final = 4
_RUNS: Final = 60


@dataclass(frozen=True)
class Shown:
    """A frame as a viewer gets it: the number of the avatar's frame that it is made of, and BGR uint8 pixels."""

    number: int
    picture: Pixels


Film = Callable[[Samples], Iterator[Shown]]
"""Turns speech, (n,) float32 at 16 kHz, into frames at 25 fps."""


def prepare_repository(folder: Path, avatar: Path, encoder: Path, report: Report, **source: int) -> Path:
    """A model repository in `folder` with the encoder and the drawn avatar under TENANT, as the demo adds them.

    source: the avatar's frames, width and height, where others than the demo's. Raises InvalidInput.
    """
    drawn, repository = folder / "source", folder / "models"
    repository.mkdir()
    write_source(drawn, **source, progress=lambda done, total: report("draw", done, total))
    add_encoder(repository, AUDIO_ENCODER, encoder)
    add_tenant(repository, TENANT, open_source(drawn, model=avatar), Choices(), Serving(), report)
    return repository


@contextlib.contextmanager
def filming(repository: Path, folder: Path) -> Iterator[Film]:
    """Serves the repository and gives what films with it. folder: takes the service's log."""
    with EmbeddedTriton(repository) as triton, running(repository, triton.grpc, folder) as service:

        def film(samples: Samples) -> Iterator[Shown]:
            for answer in speak(service.address, TENANT, wav(samples)):
                if answer.WhichOneof("event") == "frame":
                    yield _shown(answer.frame)

        yield film


def _shown(frame: pb.Frame) -> Shown:
    return Shown(frame.number, jpeg.decode(frame.data))


def milliseconds_a_frame(repository: Path, threads: int) -> dict[str, float]:
    """Wall time of the installed models on so many cores, ms a frame of video at batch BATCH: `tenant`, `encoder` and
    `both`. One window is encoded a frame. Medians of 60 runs of ONNX Runtime, with nothing else at work."""
    random = np.random.default_rng(0)
    heard = random.uniform(0, 1, (BATCH, *AUDIO_SHAPE)).astype(np.float32)
    frames = np.zeros((BATCH, 1), np.int32)
    windows = random.uniform(-4, 4, (BATCH, *MEL_SHAPE)).astype(np.float32)
    tenant = _run_ms(repository / TENANT / "1" / MODEL, {"frame_index": frames, "audio": heard}, threads) / BATCH
    encoder = _run_ms(repository / AUDIO_ENCODER / "1" / MODEL, {"mel_spectrogram": windows}, threads) / BATCH
    return {"tenant": tenant, "encoder": encoder, "both": tenant + encoder}


def _run_ms(path: Path, inputs: dict[str, Any], threads: int) -> float:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, inputs)
    taken = list[float]()
    for _ in range(_RUNS):
        begin = time.perf_counter()
        session.run(None, inputs)
        taken.append((time.perf_counter() - begin) * 1000)
    return median(taken)
