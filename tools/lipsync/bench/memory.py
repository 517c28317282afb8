"""Part `memory`: what a tenant as long as a real one takes to add and to open, on the disk and in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import onnx

from compositor import jpeg
from compositor.blending import CROP_SIZE, cut_crop, paste
from compositor.errors import LipsyncError
from compositor.geometry import Box
from compositor.manifest import AUDIO_ENCODER, CROPS, FILES, sha256_of
from compositor.tenant import Tenant
from lipsync import architecture
from lipsync.avatar_model import loudness_encoder
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_encoder, add_tenant, disk_bytes
from lipsync.sources import Source, open_source

from .clocks import Clock, Contestant, take_turns
from .figures import Figure, PartReport, Spread, Target
from .part import Part, Run
from .subjects import footage, reference_rects, write_source

TITLE = "A tenant's memory and opening"
TENANT = "subject"
_OPENINGS = 31
_SAMPLED = 40
_PIECES = ("read and decode, by helper threads: the wait", "cut the crop", "paste", "encode", "find the cuts")


@dataclass(frozen=True)
class Sizes:
    """The tenant: its frames, and the crop rectangles of the first of them."""

    width: int = 1280
    height: int = 720
    frames: int = 523

    @property
    def rects(self) -> list[Box]:
        return reference_rects(self.width, self.height)[: self.frames]

    @property
    def decoded_bytes(self) -> int:
        """What its frames take as pixels."""
        return self.width * self.height * 3 * self.frames


class Stages:
    """Notes when `add_tenant` enters each stage."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._begun: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._begun.setdefault(stage, time.perf_counter())
        self._run.progress(f"add: {stage}", done, total)

    def seconds(self, end: float) -> dict[str, float]:
        """Wall seconds from the begin of each stage to that of the next."""
        begins = [*self._begun.values(), end]
        return {stage: later - begin for stage, begin, later in zip(self._begun, begins, begins[1:], strict=False)}


def run(run: Run) -> PartReport:
    """Adds the tenant and measures it."""
    cv2.setNumThreads(1)
    return measure(run, Sizes(320, 240, 4) if run.quick else Sizes())


def measure(run: Run, sizes: Sizes) -> PartReport:
    """Figures of a tenant with a graph that does nothing, added as `lipsync tenant add` does."""
    source, repository = run.folder / "source", run.folder / "repository"
    repository.mkdir()
    onnx.save(loudness_encoder(), run.folder / "encoder.onnx")
    add_encoder(repository, AUDIO_ENCODER, run.folder / "encoder.onnx")
    frames = footage(sizes.width, sizes.height, sizes.frames)
    for written in write_source(source, frames, sizes.rects, architecture.do_nothing()):
        run.progress("film", written, sizes.frames)
    adding = list(_adding(run, repository, open_source(source)))
    tenant = Tenant(repository, TENANT)
    opening = take_turns({"open": Contestant(lambda: Tenant(repository, TENANT))}, _OPENINGS, Clock(), lambda *_: None)
    opening_s = opening.wall_s("open")
    taken = touched(repository, TENANT)
    case = f"{sizes.frames} frames of {sizes.width}x{sizes.height}"
    figures = [
        *adding,
        *_shares(tenant, open_source(source), repository),
        *_disk(repository, tenant),
        Figure(case, "prepared tenant, opened", "time to open", "ms", opening_s.times(1e3)),
        Figure(case, "prepared tenant, opened", "CPU to open", "ms", opening.cpu_s("open").times(1e3)),
        Figure(case, "decoded frames", "memory", "MB", Spread.once(sizes.decoded_bytes / 1e6)),
        Figure(case, "prepared tenant, RSS", "memory", "MB", Spread.once(taken["Rss"] / 1e6)),
        Figure(case, "prepared tenant, PSS", "memory", "MB", Spread.once(taken["Pss"] / 1e6)),
        Figure(case, "of it not shared (PSS, anonymous)", "memory", "MB", Spread.once(taken["Pss_Anon"] / 1e6)),
    ]
    targets = [
        Target(
            "resident, added by the tenant once every frame was made (RSS)",
            Spread.once(taken["Rss"] / 1e6),
            "below",
            175,
            "MB",
        ),
        Target("open, warm page cache, wall", opening_s.times(1e3), "below", 50, "ms"),
    ]
    how = (
        f"{case} with the crop rectangles of a real tenant, added as `lipsync tenant add` does; the memory is what "
        "opening it and rendering every frame once adds to a fresh process (smaps_rollup)."
    )
    crops_mb = tenant.manifest.files[CROPS].size / 1e6
    notes = [
        f"The crops ({crops_mb:.0f} MB) belong to the model: Triton's process maps them, the compositor does not touch "
        "them unless the tenant was added with `--crops sent`."
    ]
    return PartReport("memory", TITLE, how, "memory", figures, targets, notes)


def touched(repository: Path, name: str) -> dict[str, int]:
    """What `touching` says, by a fresh process."""
    command = [sys.executable, "-m", "lipsync.bench.touching", str(repository), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise LipsyncError(f"the process that touches every frame failed: {last}")
    values: dict[str, int] = json.loads(done.stdout)
    return values


def _adding(run: Run, repository: Path, source: Source) -> Iterator[Figure]:
    stages = Stages(run)
    wall, cpu = time.perf_counter(), time.process_time()
    add_tenant(repository, TENANT, source, Choices(), Serving(), stages)
    end, cpu = time.perf_counter(), time.process_time() - cpu
    yield Figure("tenant add", "all", "wall", "s", Spread.once(end - wall))
    yield Figure("tenant add", "all, but for the check's own process", "CPU", "s", Spread.once(cpu))
    for stage, seconds in stages.seconds(end).items():
        yield Figure("tenant add", f"stage `{stage}`", "wall", "s", Spread.once(seconds))


def _shares(tenant: Tenant, source: Source, repository: Path) -> Iterator[Figure]:
    """The work on one frame, taken apart: each piece alone, one thread, over some of the frames."""
    mouth = np.full((CROP_SIZE, CROP_SIZE, 3), 128, np.uint8)
    pieces: dict[str, list[float]] = {}
    times = [time.perf_counter()]
    for number, frame in zip(range(min(_SAMPLED, tenant.frames)), source.frames, strict=False):
        times.append(time.perf_counter())
        cut_crop(frame, source.rects[number])
        times.append(time.perf_counter())
        paste(tenant.background(number), mouth, tenant.rect(number).inside(tenant.frame(number).patch), "feather")
        times.append(time.perf_counter())
        data = jpeg.encode(frame, tenant.encoding)
        times.append(time.perf_counter())
        jpeg.cuts(jpeg.split(data)[1], tenant.layout, tenant.frame(number).patch)
        times.append(time.perf_counter())
        for piece, begin, end in zip(_PIECES, times, times[1:], strict=False):
            pieces.setdefault(piece, []).append(end - begin)
        times = [time.perf_counter()]
    for piece, seconds in pieces.items():
        yield Figure("tenant add, a frame", piece, "wall", "ms", Spread.of(seconds).times(1e3))
    begin = time.perf_counter()
    for file in FILES:
        sha256_of(repository / TENANT / "1" / file)
    yield Figure("tenant add", "checksums", "wall", "s", Spread.once(time.perf_counter() - begin))


def _disk(repository: Path, tenant: Tenant) -> Iterator[Figure]:
    yield Figure("disk", "all, raw model included", "size", "MB", Spread.once(disk_bytes(repository, TENANT) / 1e6))
    for name, record in tenant.manifest.files.items():
        yield Figure("disk", name, "size", "MB", Spread.once(record.size / 1e6))


PART = Part("memory", TITLE, run)
