"""Small tenants for the tests of preparation: pictures with a moving face-like square, models of a few nodes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from compositor.geometry import Box
from compositor.triton.shared_memory import Region
from lipsync import architecture, repository, service_stats, tenant_list, tritonserver
from lipsync.bench import service, wire
from lipsync.graph_builder import GraphBuilder
from lipsync.model_check import ProbeResult
from lipsync.model_interface import AvatarModel
from lipsync.preparation import Choices, Graph
from lipsync.repository import Serving
from lipsync.sources import Source, open_source
from lipsync.triton_processes import SHM, region_prefix

FRAMES = 8
WIDTH, HEIGHT = 320, 240

Array = NDArray[Any]


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def pictures(frames: int = FRAMES, width: int = WIDTH, height: int = HEIGHT) -> list[NDArray[np.uint8]]:
    """BGR frames: a smooth random background and a bright square that moves."""
    rng = np.random.default_rng(1)
    background = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), (0, 0), 4)
    made = []
    for number in range(frames):
        picture = background.copy()
        cv2.rectangle(picture, (70 + 3 * number, 60), (150 + 3 * number, 140), (40, 90, 220), -1)
        made.append(picture.astype(np.uint8))
    return made


def rectangles(frames: int = FRAMES) -> list[list[int]]:
    return [[61 + 3 * number, 43 + number, 171 + 3 * number, 153 + number] for number in range(frames)]


def write_frames(folder: Path, frames: Sequence[Array], suffix: str = ".png") -> Path:
    folder.mkdir(parents=True)
    for number, picture in enumerate(frames):
        cv2.imwrite(str(folder / f"frame_{number}{suffix}"), picture)
    return folder


def write_source(directory: Path, model: onnx.ModelProto | None = None, frames: int = FRAMES) -> Path:
    """A tenant's source directory in the fixed layout."""
    write_frames(directory / "frames", pictures(frames))
    (directory / "crop_rects.json").write_text(json.dumps(rectangles(frames)))
    (directory / "checkpoint").mkdir()
    (directory / "checkpoint" / "model_best.onnx").write_bytes((model or negative()).SerializeToString())
    return directory


def negative() -> onnx.ModelProto:
    """A model of the family's interface that predicts the ROI's negative: unlike do_nothing's, its mouths show."""
    graph = GraphBuilder("negative")
    visual = graph.input("visual", ("n", 6, 320, 320))
    graph.input("audio", ("n", 32, 16, 16))
    bounds = [graph.constant(name, np.array([value])) for name, value in (("begin", 0), ("end", 3), ("axis", 1))]
    roi = graph.node("Slice", [visual, *bounds], "roi")
    graph.node("Sub", [graph.constant("one", np.float32(1)), roi], "negate", output="output")
    graph.output("output", ("n", 3, 320, 320))
    return graph.model()


def poked(at: tuple[int, int, int] = (2, 319, 319), **interface: Any) -> onnx.ModelProto:
    """The ROI, but that audio[:, 0, 0, 0] is added to one element of the prediction: (channel, row, column)."""
    graph = GraphBuilder("poked")
    visual, audio = graph.input("visual", ("n", 6, 320, 320)), graph.input("audio", ("n", 32, 16, 16))

    def cut(tensor: str, name: str, axes: list[int], ends: list[int]) -> str:
        values = {"begin": [0] * len(axes), "end": ends, "axes": axes}
        return graph.node(
            "Slice", [tensor, *(graph.constant(f"{name}/{key}", np.array(v)) for key, v in values.items())], name
        )

    after = [size - 1 - position for size, position in zip((3, 320, 320), at, strict=True)]
    pads = graph.constant("pads", np.array([0, *at, 0, *after]))
    grown = graph.node("Pad", [cut(audio, "sample", [1, 2, 3], [1, 1, 1]), pads], "grown")
    graph.node("Add", [cut(visual, "roi", [1], [3]), grown], "sum", output="output")
    graph.output("output", ("n", 3, 320, 320))
    return graph.model(**interface)


def as_graph(model: onnx.ModelProto) -> Graph:
    return Graph(model, ("visual", "audio", "output"), hashlib.sha256(model.SerializeToString()).hexdigest())


def run(model: onnx.ModelProto | Path, feed: dict[str, Array]) -> list[Array]:
    """All outputs of a model; a path may have its external data beside it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    content = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    outputs: list[Array] = session.run(None, feed)
    return outputs


def boxes(frames: int = FRAMES) -> list[Box]:
    return [Box(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in rectangles(frames)]


def tree(folder: Path) -> dict[str, str]:
    """Every path below a folder with what tells whether it changed."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def install_encoder(models: Path, model: onnx.ModelProto | None = None) -> Path:
    """An encoder in its place, without the check that `add_encoder` makes."""
    path = models / "audio_encoder" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(model or architecture.do_nothing_encoder(), path)
    return path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A model repository with an encoder in it."""
    folder = tmp_path / "models"
    install_encoder(folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A small tenant's source."""
    return open_source(write_source(tmp_path / "source"))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are not probed and measured in child processes: for tests of what comes after the check."""
    monkeypatch.setattr(repository, "probe", believe)
    monkeypatch.setattr(repository, "backend_bytes", lambda *arguments: 1 << 20)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is asked, started or stopped may take long: a machine that is busy with something else is no fault."""
    monkeypatch.setattr(service_stats, "PATIENCE_S", 60.0)
    monkeypatch.setattr(tenant_list, "PATIENCE_S", 60.0)
    monkeypatch.setattr(service, "START_TIMEOUT_S", 120.0)
    monkeypatch.setattr(service, "STOP_TIMEOUT_S", 120.0)


@pytest.fixture
def leftovers(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Names what the Tritons, the services and the regions of this test have left in shared memory. Only theirs: other
    processes come and go there meanwhile."""
    marks, stop = set[str](), service.stop

    def marked_prefix(keeper_pid: int) -> str:
        prefix = region_prefix(keeper_pid)
        marks.add(prefix)
        return prefix

    def marked_region(slots: int, slot_bytes: int) -> Region:
        made = Region(slots, slot_bytes)
        marks.add(number_of(made.name))
        return made

    def marked_stop(process: subprocess.Popen[bytes]) -> None:
        marks.update(number_of(name) for name in shared_names(process.pid))
        stop(process)

    def left() -> list[str]:
        assert marks, "nobody took shared memory"
        return [path.name for path in SHM.iterdir() if any(mark in path.name for mark in marks)]

    monkeypatch.setattr(tritonserver, "region_prefix", marked_prefix)
    monkeypatch.setattr(wire, "Region", marked_region)
    monkeypatch.setattr(service, "stop", marked_stop)
    return left


def number_of(name: str) -> str:
    """What a region's name and that of the lock beside it have in common."""
    return name.rpartition("-")[2]


def shared_names(pid: int) -> set[str]:
    """The files in shared memory that a process has open."""
    names = set[str]()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = descriptor.readlink()
            names |= {target.name} if target.parent == SHM else set()
    return names


def believe(path: Path, batch: int, **options: object) -> ProbeResult:
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    found = AvatarModel(("visual", "audio"), "output", 17, 8, "dynamic", digest, len(data))
    return ProbeResult(found, batch, 1, 0.1, 1 << 20)


def add(models: Path, source: Source, name: str = "anna", **choices: Any) -> None:
    repository.add_tenant(models, name, source, Choices(**choices), Serving(threads=1), silent)


def can_mount() -> str:
    """The command that gives a process a private mount namespace in which it may mount, or nothing."""
    for command in ("unshare -m", "unshare -Urm"):
        trial = [*command.split(), "mount", "-t", "tmpfs", "-o", "size=64k", "none", "/mnt"]
        try:
            if subprocess.run(trial, capture_output=True, check=False, timeout=60).returncode == 0:
                return command
        except OSError:
            return ""
    return ""
