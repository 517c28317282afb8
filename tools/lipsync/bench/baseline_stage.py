"""Everybody of the part `baselines`, started on one scene and one Triton, with one model; and what each sends."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import tritonclient.grpc as wire
from tritonclient.utils import InferenceServerException

from compositor import jpeg
from compositor.errors import InferenceFailed, LipsyncError
from compositor.manifest import RAW_SUFFIX

from . import service
from .baseline_scene import Model, Scene
from .child import Child
from .contenders import Composite, Contender, Generate, PlainLoop, Predecessor, fastest_batch
from .relay import Relay

PREDECESSOR, PLAIN, COMPOSITE, GENERATE = "predecessor", "plain loop", "ours, Composite", "ours, Generate"
LEAST_PSNR_DB = 40.0
"""Between the decoded frames of any two contenders: their JPEG encoders round differently."""
_BATCHES = (1, 4, 24)
_PACKAGE = __name__.rpartition(".")[0]


class Stage:
    """Where the contenders meet over one model of a scene."""

    def __init__(self, scene: Scene, model: Model, triton: str, scratch: Path) -> None:
        """triton: the gRPC address of a Triton on the scene's repository; it loads the raw model here, the fused one
        when the compositor asks. scratch: an existing folder."""
        self.task = scene.task(model.tenant)
        self.loop_batch = 0
        self._scene, self._model, self._triton, self._scratch = scene, model, triton, scratch
        raw = model.tenant + RAW_SUFFIX
        with contextlib.closing(wire.InferenceServerClient(triton)) as server:
            try:
                server.load_model(raw)
            except InferenceServerException as error:
                raise InferenceFailed(f"Triton does not load {raw!r}: {error.message()}") from error

    @contextlib.contextmanager
    def contenders(self) -> Iterator[Mapping[str, Contender]]:
        """Everybody by name, checked to give the same pictures; the plain loop at its best batch size."""
        with contextlib.ExitStack() as stack:
            loop = stack.enter_context(self._loop())
            self.loop_batch = fastest_batch(loop, self.task, [size for size in _BATCHES if size <= self.task.frames])
            theirs = stack.enter_context(self._predecessor(self._triton))
            ours = stack.enter_context(self._compositor(self._triton))
            remote = {
                PREDECESSOR: Predecessor(*theirs, self.task),
                COMPOSITE: Composite(*ours, self.task),
                GENERATE: Generate(*ours, self.task),
            }
            for contender in remote.values():
                stack.enter_context(contextlib.closing(contender))
            everybody: dict[str, Contender] = {PLAIN: PlainLoop(loop, self.task, self.loop_batch), **remote}
            check_pictures({name: contender.jpegs(self._scratch) for name, contender in everybody.items()})
            yield everybody

    def bytes_a_frame(self) -> Iterator[tuple[str, str, float]]:
        """(who, between whom, bytes a frame in both directions together) of all who send any, counted by relays before
        and behind services that are started for this."""
        for starting, kinds in (
            (self._predecessor, {PREDECESSOR: Predecessor}),
            (self._compositor, {COMPOSITE: Composite, GENERATE: Generate}),
        ):
            with Relay(self._triton) as behind, starting(behind.address) as (address, pid), Relay(address) as before:
                for name, kind in kinds.items():
                    with contextlib.closing(kind(before.address, pid, self.task)) as contender:
                        contender.run(1)
                        passed = before.passed, behind.passed
                        contender.run(1)
                        yield name, "client and service", (before.passed - passed[0]) / self.task.frames
                        yield name, "service and Triton", (behind.passed - passed[1]) / self.task.frames

    def _loop(self) -> Child:
        graph = self._scene.graph(self.task.tenant)
        arguments = [str(self._scene.folder), str(graph), str(self._model.threads)]
        return Child(f"{_PACKAGE}.plain_loop", arguments)

    @contextlib.contextmanager
    def _predecessor(self, triton: str) -> Iterator[tuple[str, int]]:
        with Child(f"{_PACKAGE}.predecessor", [str(self._scene.folder), triton]) as child:
            yield child.announced, child.pid

    @contextlib.contextmanager
    def _compositor(self, triton: str) -> Iterator[tuple[str, int]]:
        with service.running(self._scene.repository, triton, self._scratch) as running:
            yield running.address, running.pid


def check_pictures(frames: Mapping[str, Sequence[bytes]]) -> None:
    """Raises LipsyncError unless everybody's JPEGs show the same: each at least LEAST_PSNR_DB from each other's."""
    shown = {name: [jpeg.decode(data) for data in found] for name, found in frames.items()}
    for (name, pictures), (other, expected) in itertools.combinations(shown.items(), 2):
        if len(pictures) != len(expected):
            raise LipsyncError(f"{name!r} gives {len(pictures)} frames, {other!r} {len(expected)}")
        for number, (picture, wanted) in enumerate(zip(pictures, expected, strict=True)):
            if picture.shape != wanted.shape or (found_db := cv2.PSNR(picture, wanted)) < LEAST_PSNR_DB:
                short = "of another size" if picture.shape != wanted.shape else f"{found_db:.1f} dB away"
                raise LipsyncError(f"frame {number} by {name!r} is another picture than by {other!r}: {short}")
