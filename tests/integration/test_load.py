"""`lipsync bench load` and the locustfile on the real service."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..conftest import Stack

pytestmark = pytest.mark.triton

LOCUSTFILE = Path(__file__).parents[2] / "tools" / "bench" / "locustfile.py"


def bench_load(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lipsync", "bench", "load", "--quick", "-o", str(folder), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def on(stack: Stack, tenant: str) -> tuple[str, ...]:
    return ("--host", stack.service.address, "--tenants", tenant)


def part_in(folder: Path) -> dict[str, Any]:
    """The one part of the report, its figures as (subject, quantity) -> median."""
    report = json.loads((folder / "load.json").read_text())
    (part,) = report["parts"]
    found: dict[str, Any] = part
    found["medians"] = {
        (figure["subject"], figure["quantity"]): figure["spread"]["median"] for figure in part["figures"]
    }
    return found


def test_two_viewers_on_a_stack_of_its_own(triton_home: Path, tmp_path: Path) -> None:
    done = bench_load(tmp_path, "--users", "2")
    assert done.returncode == 0, done.stderr
    part = part_in(tmp_path)
    medians = part["medians"]
    assert part["failure"] == ""
    assert "2 viewers" in part["how"]
    assert medians["speeches", "asked for"] >= 2
    assert medians["speeches", "failed"] == 0
    for name in ("first frame", "frame gap", "total"):
        assert 0 < medians[name, "p50"] <= medians[name, "p95"] <= medians[name, "p99"]
    assert medians["frames", "frames a second"] > 0
    for who in ("load generator", "compositor", "Triton"):
        assert medians[who, "CPU a frame"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"load.json", "load.md", "load.svg"}


def test_viewers_of_a_service_that_runs(stack: Stack, tmp_path: Path) -> None:
    done = bench_load(tmp_path, "--users", "2", "--time", "1s", *on(stack, "plain"))
    assert done.returncode == 0, done.stderr
    part = part_in(tmp_path)
    assert part["medians"]["speeches", "failed"] == 0
    assert "its CPU is not known" in part["how"]
    assert ("load generator", "CPU") in part["medians"]
    assert ("compositor", "CPU") not in part["medians"]


def test_a_service_that_refuses_is_quoted(stack: Stack, tmp_path: Path) -> None:
    done = bench_load(tmp_path, "--users", "1", "--time", "1s", *on(stack, "nobody"))
    assert done.returncode == 1
    words = "NOT_FOUND TENANT_NOT_FOUND: no tenant named 'nobody' is installed"
    assert f"no speech went well at {stack.service.address}: {words}" in done.stderr
    assert words in part_in(tmp_path)["failure"]


def test_the_locustfile_alone_reports_events_by_hand(stack: Stack, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "locust", "-f", LOCUSTFILE, "--host", stack.service.address, "--headless"),
            *("--users", "1", "--run-time", "1s", "--stop-timeout", "60s", "--repository", stack.repository),
            *("--tenants", "plain", "--json-file", tmp_path / "run"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row["num_requests"] for row in json.loads((tmp_path / "run.json").read_text())}
    assert rows["first frame"] == rows["total"] >= 1
    # 4 or 6 seconds at 25 fps, the first frame aside.
    assert rows["frame gap"] >= 99 * rows["total"]
