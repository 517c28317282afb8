"""What everybody in the part `baselines` works on: one film, one speech, and the tenants made of them."""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from compositor.audio import SAMPLE_RATE
from compositor.blending import Pixels, cut_crop
from compositor.features import clip_features
from compositor.manifest import AUDIO_ENCODER, MODEL, RAW_SUFFIX
from compositor.tenant import CROP_BYTES
from lipsync.avatar_model import loudness_encoder
from lipsync.model_config import raw_config
from lipsync.preparation import Choices, session
from lipsync.repository import Serving, add_encoder, add_tenant
from lipsync.sources import Source

from . import plain_loop
from .compositing import Film
from .contenders import Task
from .held_film import write_film
from .subjects import centred_rects, footage
from .wire import build_visual

FPS = 25


@dataclass(frozen=True)
class Model:
    """A model that all are measured with, how many threads run it, and the number of rounds by that of clients."""

    tenant: str
    name: str
    graph: Callable[[], onnx.ModelProto]
    threads: int
    rounds: Mapping[int, int]


@dataclass(frozen=True)
class Sizes:
    """Frame size and the mouth's side in pixels, backgrounds, frames a batch."""

    width: int = 1280
    height: int = 720
    side: int = 300
    backgrounds: int = 48
    batch: int = 24


class Scene:
    """The film and the speech; `folder` holds what the plain loop and the predecessor's service read, `repository` the
    tenants."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        """folder: one that takes all of it, under the names `film`, `repository` and `encoder.onnx`."""
        self.sizes, self.folder, self.repository = sizes, folder / "film", folder / "repository"
        self.repository.mkdir()
        onnx.save(loudness_encoder(), folder / "encoder.onnx")
        add_encoder(self.repository, AUDIO_ENCODER, folder / "encoder.onnx")
        self._rects = centred_rects(sizes.width, sizes.height, sizes.backgrounds, sizes.side)
        self._frames: list[Pixels] = list(footage(sizes.width, sizes.height, sizes.backgrounds))
        write_film(self.folder, self._frames, self._rects)
        pairs = zip(self._frames, self._rects, strict=True)
        self._visual = build_visual(np.stack([cut_crop(frame, rect) for frame, rect in pairs]))
        samples = speech(sizes.batch)
        self._wav, self._features = as_wav(samples), self._encoded(samples)
        np.save(self.folder / plain_loop.VISUAL, self._visual)
        np.save(self.folder / plain_loop.AUDIO, self._features)

    @property
    def visual_bytes(self) -> int:
        """Of one frame's pictures for the model."""
        size: int = self._visual[0].nbytes
        return size

    @property
    def held_bytes(self) -> int:
        """Of one background held as pixels, with its crop."""
        return self._frames[0].nbytes + CROP_BYTES

    def task(self, tenant: str) -> Task:
        """The batch of a tenant."""
        return Task(tenant, self._wav, self._features, self._visual[: self.sizes.batch])

    def graph(self, tenant: str) -> Path:
        """The tenant's uploaded graph."""
        return self.repository / (tenant + RAW_SUFFIX) / "1" / MODEL

    def add(self, model: Model) -> None:
        """Installs a tenant as `lipsync tenant add` does, pasted hard as the predecessor pastes; its raw model takes
        the predecessor's whole batch."""
        path = self.folder / f"{model.tenant}.onnx"
        onnx.save(model.graph(), path)
        source = Source(path, Film(self._frames), self._rects)
        choices = Choices(blend="hard", idle="background", crops="resident")
        serving = Serving(threads=model.threads)
        add_tenant(self.repository, model.tenant, source, choices, serving, lambda *_: None)
        raw = model.tenant + RAW_SUFFIX
        config = raw_config(raw, self.sizes.batch, serving.kind, serving.threads)
        (self.repository / raw / "config.pbtxt").write_text(config)

    def _encoded(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """The features of the speech, by the encoder that the service has."""
        running = session(str(self.repository / AUDIO_ENCODER / "1" / MODEL))

        def encode(windows: NDArray[np.float32]) -> NDArray[np.float32]:
            embeddings: NDArray[np.float32] = running.run(["audio_features"], {"mel_spectrogram": windows})[0]
            return embeddings

        return clip_features(samples, SAMPLE_RATE, encode, FPS, "silence")


def speech(frames: int) -> NDArray[np.float32]:
    """Mono samples of that many video frames at 16 kHz: a chord that swells and fades, in the levels of PCM16."""
    time_s = np.arange(frames * SAMPLE_RATE // FPS) / SAMPLE_RATE
    chord = sum(np.sin(2 * np.pi * pitch * time_s) for pitch in (220, 440, 660, 880, 1320))
    samples = 0.15 * np.asarray(chord) * np.sin(np.pi * 3 * time_s) ** 2
    levels: NDArray[np.float32] = (np.round(samples * 32768) / 32768).astype(np.float32)
    return levels


def as_wav(samples: NDArray[np.float32]) -> bytes:
    """A WAV file, 16 kHz mono PCM16."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((samples * 32768).astype("<i2").tobytes())
    return out.getvalue()
