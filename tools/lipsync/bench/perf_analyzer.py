"""NVIDIA's perf_analyzer: installed into a folder of its own, run on a model, its figures read.

Knows nothing of tenants. The program comes from the tritonclient wheel of the embedded server's release; what it lacks
lies in the server's own wheel under other names.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compositor.errors import InferenceFailed, LipsyncError
from lipsync.triton_install import TritonHome

WHEEL = "tritonclient==2.50.0"
_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
_WINDOW_MS = 1000
# An unstable measurement leaves no figures at all. Ours are repeated, and their spread is reported instead.
_ANY_SPREAD = "1000"
_TIMEOUT_S = 120


@dataclass(frozen=True)
class PerfAnalyzer:
    """An installed perf_analyzer."""

    program: Path
    library_path: str


@dataclass(frozen=True)
class Load:
    """What perf_analyzer shall do: requests of `batch` inputs each, `concurrency` of them in flight."""

    model: str
    address: str
    data: Path
    batch: int
    concurrency: int
    output_bytes: int
    """Size of the largest output of one request, for its shared memory."""


@dataclass(frozen=True)
class Measured:
    """Of one load: inferences a second, and the median latency of a request in milliseconds."""

    inferences_per_s: float
    latency_ms: float


def install(home: TritonHome, report: Callable[[str], None]) -> PerfAnalyzer:
    """Puts perf_analyzer beside the embedded Triton; at once where it is. Raises LipsyncError."""
    folder = home.root / f"perf_analyzer-{WHEEL.partition('==')[2]}"
    if not folder.is_dir():
        report(f"installing perf_analyzer from {WHEEL} into {folder}")
        with tempfile.TemporaryDirectory(prefix="perf_analyzer.staging-", dir=home.root) as staging:
            _unpack(home, Path(staging))
            (Path(staging) / "made").rename(folder)
    return PerfAnalyzer(folder / "perf_analyzer", f"{folder}:{home.library_path}")


def _unpack(home: TritonHome, staging: Path) -> None:
    options = ["--no-deps", "--no-compile", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", *options, "--quiet", "--target", str(staging / "wheel"), WHEEL]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LipsyncError(f"pip could not install {WHEEL}: {_last_line(done)}")
    made = staging / "made"
    made.mkdir()
    shutil.move(staging / "wheel" / "bin" / "perf_analyzer", made / "perf_analyzer")
    libraries = home.root / "wheel" / "nvidia_pytriton.libs"
    for name, pattern in _LIBRARIES.items():
        found = next(libraries.glob(pattern), None)
        if found is None:
            raise LipsyncError(f"{name} is missing in {libraries}: delete {home.root} and run this again")
        (made / name).symlink_to(os.path.relpath(found, home.root / "any"))


def measure(analyzer: PerfAnalyzer, load: Load) -> Measured:
    """Runs one load over system shared memory, three windows of a second. Raises InferenceFailed."""
    with tempfile.TemporaryDirectory(prefix="lipsync-bench-") as folder:
        table = Path(folder) / "figures.csv"
        # Never --profile-export-file: it stores every tensor.
        command = [
            *(str(analyzer.program), "-m", load.model, "-i", "grpc", "-u", load.address, "-b", str(load.batch)),
            *("--concurrency-range", f"{load.concurrency}:{load.concurrency}", "--input-data", str(load.data)),
            *("--shared-memory", "system", "--output-shared-memory-size", str(load.output_bytes)),
            *("--measurement-interval", str(_WINDOW_MS), "-s", _ANY_SPREAD, "-f", str(table)),
        ]
        environment = {**os.environ, "LD_LIBRARY_PATH": analyzer.library_path}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment, timeout=_TIMEOUT_S
            )
        except subprocess.TimeoutExpired as error:
            raise InferenceFailed(f"perf_analyzer on {load.model} did not end within {_TIMEOUT_S} s") from error
        if done.returncode or not table.is_file():
            raise InferenceFailed(f"perf_analyzer on {load.model} failed: {_last_line(done)}")
        return read_figures(table)


def read_figures(table: Path) -> Measured:
    """The one row of perf_analyzer's CSV file; its latencies are microseconds. Raises InferenceFailed."""
    with table.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    try:
        return Measured(float(rows[0]["Inferences/Second"]), float(rows[0]["p50 latency"]) / 1000)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise InferenceFailed("perf_analyzer wrote no figures: the model answered nothing in time") from error


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"status {done.returncode}"]
    return lines[-1].strip()
