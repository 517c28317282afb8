"""The loop that a user writes first: ONNX Runtime and OpenCV in one process, frame after frame. A baseline.

Each line on standard input asks for frames; the lines `first` and `done` answer when the first and the last are made.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .child import announce
from .held_film import HeldFilm

AUDIO, VISUAL = "audio.npy", "visual.npy"
FIRST, DONE = "first", "done"
_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
"""The first that is there, as Triton does it with `KIND_AUTO`."""
_QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 75]


@dataclass(frozen=True)
class Order:
    """Frames 0 to `frames` in batches of `batch`; written into the folder `kept` if it has a name."""

    frames: int
    batch: int
    kept: str = ""

    def as_line(self) -> str:
        return json.dumps(asdict(self))


class Loop:
    """The model, run by `threads`, the film, and the model's pictures float32 (n, 6, 320, 320), made beforehand."""

    def __init__(self, model: Path, film: HeldFilm, folder: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(model), options, providers=_providers())
        self._film = film
        self._visual: NDArray[np.float32] = np.load(folder / VISUAL)
        self._audio: NDArray[np.float32] = np.load(folder / AUDIO)

    def frames(self, order: Order) -> Iterator[bytes]:
        """The JPEGs, in order."""
        for begin in range(0, order.frames, order.batch):
            batch = slice(begin, min(begin + order.batch, order.frames))
            feed = {"visual": self._visual[batch], "audio": self._audio[batch]}
            for number, prediction in enumerate(self._session.run(["output"], feed)[0], start=begin):
                yield cv2.imencode(".jpg", self._film.composited(number, prediction), _QUALITY)[1].tobytes()


def _providers() -> list[str]:
    return [name for name in _PROVIDERS if name in onnxruntime.get_available_providers()]


def obey(loop: Loop, order: Order) -> None:
    """Makes what is asked for and says so."""
    made: list[bytes] = []
    for frame in loop.frames(order):
        if not made:
            announce(FIRST)
        made.append(frame)
    if order.kept:
        for number, frame in enumerate(made):
            (Path(order.kept) / f"{number}.jpg").write_bytes(frame)
    announce(DONE)


def main(folder: Path, model: Path, threads: int) -> None:
    """Obeys every line until there are no more."""
    loop = Loop(model, HeldFilm(folder), folder, threads)
    announce("ready")
    for line in sys.stdin:
        obey(loop, Order(**json.loads(line)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
