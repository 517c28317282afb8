"""Part `load`: viewers in a locust process of its own on the whole service, ours or one that runs already.

Starts what it drives, reads what the viewers saw and what CPU that took; `viewer` is what a viewer does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx

from compositor.errors import InvalidInput, LipsyncError
from compositor.manifest import AUDIO_ENCODER, tenant_names
from lipsync import architecture, client
from lipsync.avatar_model import loudness_encoder
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_encoder, add_tenant
from lipsync.sentences import HELLO
from lipsync.sources import open_source
from lipsync.tritonserver import EmbeddedTriton

from . import service
from .clocks import living_cpu_s
from .figures import Figure, PartReport, Spread
from .part import Part, Run
from .subjects import centred_rects, footage, write_source
from .watching import FIRST_FRAME, FRAME_GAP, LATE_FRAME, TOTAL, Measured

TITLE = "Viewers on the whole service"
LOCUSTFILE = Path(__file__).with_name("viewer.py")
_TENANTS, _FRAMES, _WIDTH, _HEIGHT = 4, 24, 640, 360
_QUICK_S = 3
_END_S = 30.0
# Locust's one loop can take one core; from here on it answers late, and what it measures is itself.
_BUSY_CORES = 0.8


@dataclass(frozen=True)
class Demand:
    """What the viewers do. seconds: how long; spawn_rate: viewers that come a second, all at once where None; tenants:
    the most wanted first, all that there are if empty; zipf: exponent of their popularity."""

    users: int = 4
    seconds: int = 30
    spawn_rate: float | None = None
    zipf: float = 1.0
    tenants: Sequence[str] = ()
    flat_out: bool = False
    """Ask again at once instead of watching each speech to its end."""
    timeout_s: float = 60.0
    """Longest that one speech may take."""
    web_port: int | None = None
    """Where locust's web page starts and stops the test, until it is interrupted; without it the test just runs."""


@dataclass(frozen=True)
class Driven:
    """The service under load: its address, in words, how locust finds its tenants, how many these are, and CPU seconds
    of its processes where they are ours."""

    address: str
    what: str
    choice: Sequence[str]
    tenants: int
    cpu_s: Callable[[], Mapping[str, float]] = dict


def part(demand: Demand, host: str | None = None, repository: Path | None = None) -> Part:
    """The part for a service at `host` (host:port), or else for one that it starts on `repository`, or else on a
    repository of its own."""
    return Part("load", TITLE, partial(_run, demand=demand, host=host, repository=repository))


def _run(run: Run, *, demand: Demand, host: str | None, repository: Path | None) -> PartReport:
    if importlib.util.find_spec("locust") is None:
        raise LipsyncError(f"locust is missing: run `{sys.executable} -m pip install locust`")
    if run.quick:
        demand = replace(demand, seconds=min(demand.seconds, _QUICK_S))
    with _driven(run, demand, host, repository) as driven:
        before = driven.cpu_s()
        measured = _watched(run, demand, driven)
        after = driven.cpu_s()
    cpu_s = {"load generator": measured.cpu_s, **{name: after[name] - before[name] for name in before}}
    pace = "asks again at once" if demand.flat_out else "asks for the next when that has played to its end"
    how = (
        f"Locust {metadata.version('locust')}, {measured.users} viewers, one gRPC channel each, for "
        f"{measured.wall_s:.0f} s; each chooses one of {driven.tenants} tenants by Zipf (exponent {demand.zipf:g}), "
        f"lets it say a bundled sentence and {pace}. {driven.what} A frame is late that comes after the first frame by "
        "more than its presentation time. CPU of the load generator: its own process."
    )
    figures = list(figures_of(measured, cpu_s))
    return PartReport("load", TITLE, how, "p95", figures, notes=list(notes_of(measured)))


@contextlib.contextmanager
def _driven(run: Run, demand: Demand, host: str | None, repository: Path | None) -> Iterator[Driven]:
    if host is not None:
        choice, names = _tenants(demand, repository)
        if not names:
            raise InvalidInput("no tenants to ask for at that host: name them with --tenants a,b,c", field="tenants")
        yield Driven(host, "The service ran already; its CPU is not known.", choice, len(names))
        return
    with _ours(run, demand, repository) as driven:
        yield driven


@contextlib.contextmanager
def _ours(run: Run, demand: Demand, given: Path | None) -> Iterator[Driven]:
    repository = given or run.folder / "repository"
    if given is None:
        add_tenants(run, repository, 2 if run.quick else _TENANTS)
    choice, names = _tenants(demand, repository)
    if not names:
        raise InvalidInput(f"no tenants in {repository}; add one with `lipsync tenant add`", field="repository")
    small = f"{_FRAMES} frames of {_WIDTH}x{_HEIGHT} each and a graph that does nothing, loaded before"
    models = small if given is None else "loaded on first use"
    with EmbeddedTriton(repository) as triton, service.running(repository, triton.grpc, run.folder) as compositor:
        if given is None:
            for name in names:
                list(client.speak(compositor.address, name, HELLO.read_bytes(), demand.timeout_s))

        def cpu_s() -> dict[str, float]:
            return {"compositor": compositor.cpu_s(), "Triton": living_cpu_s(service.triton_pids(triton))}

        what = f"Embedded Triton and compositor on the same machine; tenants: {models}."
        yield Driven(compositor.address, what, choice, len(names), cpu_s)


def _tenants(demand: Demand, repository: Path | None) -> tuple[list[str], Sequence[str]]:
    """Locust's options for them, and their names. Thousands of names would not fit on a command line."""
    if demand.tenants or repository is None:
        return ["--tenants", ",".join(demand.tenants)], demand.tenants
    return ["--repository", str(repository.absolute())], tenant_names(repository)


def add_tenants(run: Run, repository: Path, count: int) -> None:
    """Makes a repository of small tenants, each with a model of its own that does nothing."""
    repository.mkdir()
    encoder, source = run.folder / "encoder.onnx", run.folder / "source"
    onnx.save(loudness_encoder(), encoder)
    add_encoder(repository, AUDIO_ENCODER, encoder)
    rects = centred_rects(_WIDTH, _HEIGHT, _FRAMES, _HEIGHT // 2)
    for _ in write_source(source, footage(_WIDTH, _HEIGHT, _FRAMES), rects, architecture.do_nothing()):
        pass
    for number in range(count):
        add_tenant(repository, f"tenant{number + 1}", open_source(source), Choices(), Serving(), lambda *_: None)
        run.progress("tenants", number + 1, count)


def _watched(run: Run, demand: Demand, driven: Driven) -> Measured:
    """Runs locust to its end and reads what its viewers saw. Raises LipsyncError where that is nothing."""
    path, log = run.folder / "measured.json", run.folder / "locust.log"
    command = service.following("locust", *_arguments(demand, driven, path))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
    with log.open("wb") as output:
        said = None if demand.web_port is not None else output
        # Somewhere without a locust.conf.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment, cwd=run.folder
        )
        try:
            _wait(process, run, demand)
        finally:
            service.stop(process)
    if not path.is_file():
        last = (log.read_text(errors="replace").strip().splitlines() or [f"status {process.returncode}"])[-1]
        raise LipsyncError(f"locust failed: {last.removeprefix('error: ')}")
    measured = Measured.from_json(path.read_text())
    if not measured.delays_ms[TOTAL]:
        words = max(measured.failures, key=lambda fault: measured.failures[fault], default="none ended in time")
        raise LipsyncError(f"no speech went well at {driven.address}: {words}")
    return measured


def _arguments(demand: Demand, driven: Driven, path: Path) -> list[str]:
    if demand.web_port is None:
        mode = ["--headless", "--only-summary", "--run-time", f"{demand.seconds}s"]
    else:
        mode = ["--web-host", "127.0.0.1", "--web-port", str(demand.web_port)]
    return [
        *("-f", str(LOCUSTFILE), "--host", driven.address, *mode, "--users", str(demand.users)),
        *("--spawn-rate", str(demand.spawn_rate or demand.users), "--stop-timeout", f"{math.ceil(demand.timeout_s)}s"),
        *(*driven.choice, "--zipf", str(demand.zipf), "--call-timeout", str(demand.timeout_s)),
        *("--measured", str(path), *(["--flat-out"] if demand.flat_out else [])),
    ]


def _wait(process: subprocess.Popen[bytes], run: Run, demand: Demand) -> None:
    """Waits for locust's end, which from its web page is Ctrl-C, for locust as for this process."""
    begin, last_s = time.monotonic(), demand.seconds + demand.timeout_s + _END_S
    while process.poll() is None:
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
        except KeyboardInterrupt:
            if demand.web_port is None:
                raise
        passed = time.monotonic() - begin
        if demand.web_port is None:
            run.progress("load", min(int(passed), demand.seconds), demand.seconds)
            if passed > last_s:
                raise LipsyncError(f"locust did not end within {last_s:.0f} s")


def figures_of(measured: Measured, cpu_s: Mapping[str, float]) -> Iterator[Figure]:
    """The figures of a run. cpu_s: CPU seconds meanwhile, by who took them."""
    case = f"{measured.users} viewers"
    asked, failed, frames = sum(measured.tenants.values()), sum(measured.failures.values()), measured.frames
    for name in (FIRST_FRAME, FRAME_GAP, TOTAL):
        delays = measured.delays_ms[name]
        if delays:
            p95, p99 = np.percentile(delays, (95, 99)).tolist()
            yield Figure(case, name, "p50", "ms", Spread.of(delays))
            yield Figure(case, name, "p95", "ms", Spread.once(p95))
            yield Figure(case, name, "p99", "ms", Spread.once(p99))
    late = measured.delays_ms[LATE_FRAME]
    yield Figure(case, "speeches", "asked for", "", Spread.once(asked))
    yield Figure(case, "speeches", "failed", "", Spread.once(failed))
    yield Figure(case, "frames", "frames a second", "fps", Spread.once(frames / measured.wall_s))
    yield Figure(case, "frames", "late", "%", Spread.once(100 * len(late) / frames))
    if late:
        yield Figure(case, "frames", "late by, of those that are", "ms", Spread.of(late))
    for who, seconds in cpu_s.items():
        yield Figure(case, who, "CPU a frame", "ms", Spread.once(seconds * 1000 / frames))
        yield Figure(case, who, "CPU", "cores", Spread.once(seconds / measured.wall_s))


def notes_of(measured: Measured) -> Iterator[str]:
    """Failures in their own words, and whether the generator was the bottleneck."""
    for words, count in measured.failures.items():
        yield f"Failed {count} times: {words}"
    cores = measured.cpu_s / measured.wall_s
    if cores > _BUSY_CORES:
        yield f"The load generator took {cores:.2f} cores, and it can take one: its delays are in these figures."
