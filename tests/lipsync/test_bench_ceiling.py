"""perf_analyzer's part of the benchmark: its input files, its figures, and the real program against the real Triton."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from compositor.errors import InferenceFailed
from compositor.tenant import Tenant
from lipsync import architecture, repository
from lipsync.bench import ceiling, perf_analyzer
from lipsync.bench.part import Run, carry_out
from lipsync.preparation import Choices
from lipsync.repository import Serving
from lipsync.sources import Source
from lipsync.tritonserver import TritonHome, default_home, install

HEAD = "Concurrency,Inferences/Second,Client Send,p50 latency,p90 latency\n"


def add(models: Path, source: Source, crops: str) -> Tenant:
    choices = Choices(idle="background", crops=crops)  # type: ignore[arg-type]
    repository.add_tenant(models, crops, source, choices, Serving(threads=1), lambda *_: None)
    return Tenant(models, crops)


@pytest.mark.parametrize(
    ("crops", "subject", "kind"), [("resident", "frame_index", np.int32), ("sent", "crop", np.uint8)]
)
@pytest.mark.usefixtures("unchecked")
def test_inputs_are_frames_of_the_tenant(
    models: Path, source: Source, tmp_path: Path, crops: str, subject: str, kind: type[np.generic]
) -> None:
    tenant = add(models, source, crops)
    paths = ceiling.write_inputs(tenant, tmp_path)
    fused, raw = (json.loads(paths[name].read_text())["data"] for name in ("fused", "raw"))
    assert len(fused) == len(raw) == 4
    for number, (step, classical) in enumerate(zip(fused, raw, strict=True)):
        assert step.keys() == {subject, "audio"}
        values = np.frombuffer(base64.b64decode(step[subject]["b64"]), kind).reshape(step[subject]["shape"])
        expected = tenant.crop_planes(number) if crops == "sent" else np.array([number])
        assert np.array_equal(values, expected)
        visual = np.frombuffer(base64.b64decode(classical["visual"]["b64"]), np.float32)
        assert visual.size == 6 * 320 * 320
        assert classical["visual"]["shape"] == [6, 320, 320]
        assert classical["audio"] == step["audio"]
        assert len(base64.b64decode(step["audio"]["b64"])) == 4 * 32 * 16 * 16


def test_figures_are_read_by_name_and_in_milliseconds(tmp_path: Path) -> None:
    table = tmp_path / "figures.csv"
    table.write_text(HEAD + "1,32.5,15,52737,156929\n")
    assert perf_analyzer.read_figures(table) == perf_analyzer.Measured(32.5, 52.737)


@pytest.mark.parametrize("text", ["", HEAD, HEAD + "1\n", HEAD + "1,many,15,1,1\n", "Other\n1\n"])
def test_figures_that_are_missing_are_a_failure(tmp_path: Path, text: str) -> None:
    table = tmp_path / "figures.csv"
    table.write_text(text)
    with pytest.raises(InferenceFailed, match="no figures"):
        perf_analyzer.read_figures(table)


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    program = tmp_path / "perf_analyzer"
    program.write_text("#!/bin/sh\necho starting\necho 'error: no such model' >&2\nexit 99\n")
    program.chmod(0o755)
    load = perf_analyzer.Load("some", "127.0.0.1:1", tmp_path / "in.json", 1, 1, 10)
    with pytest.raises(InferenceFailed, match="on some failed: error: no such model"):
        perf_analyzer.measure(perf_analyzer.PerfAnalyzer(program, ""), load)


def test_an_installed_program_is_not_fetched_again(tmp_path: Path) -> None:
    folder = tmp_path / "perf_analyzer-2.50.0"
    folder.mkdir()
    home = TritonHome(tmp_path, tmp_path, "libraries", tmp_path, tmp_path, False, frozenset())
    said: list[str] = []
    found = perf_analyzer.install(home, said.append)
    assert found == perf_analyzer.PerfAnalyzer(folder / "perf_analyzer", f"{folder}:libraries")
    assert said == []


@pytest.mark.triton
@pytest.mark.usefixtures("unchecked")
def test_the_real_program_measures_both_models(models: Path, source: Source, triton_home: Path, tmp_path: Path) -> None:
    model = tmp_path / "nothing.onnx"
    onnx.save(architecture.do_nothing(), model)
    add(models, Source(model, source.frames, source.rects), "resident")
    (tmp_path / "run").mkdir()
    part = ceiling.part(models, "resident", [1], 2)
    found = carry_out(part, Run(tmp_path / "run", lambda *_: None, quick=True))
    assert found.failure == ""
    fps = {figure.subject: figure.spread.median for figure in found.figures if figure.unit == "fps"}
    assert fps.keys() == {"fused", "raw"}
    assert min(fps.values()) > 0
    assert install(default_home(), lambda _: None).root == triton_home
