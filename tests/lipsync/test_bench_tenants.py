"""Thousands of tenants, in small: copies by hard links, callers who want some more than others, figures, the part."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from compositor.catalogue import CONFIG
from compositor.errors import InvalidInput
from compositor.manifest import MANIFEST, MODEL, RAW_SUFFIX, tenant_names
from compositor.tenant import Tenant
from lipsync.app import build
from lipsync.bench import parts, service, tenant_callers, tenants
from lipsync.bench.child import Child
from lipsync.bench.copies import add_small_tenant, link_tenants
from lipsync.bench.figures import PartReport, Spread
from lipsync.bench.part import Part, Run, carry_out
from lipsync.bench.residency_counts import Counts, Tally
from lipsync.bench.service import Service
from lipsync.bench.tenant_callers import Answers, Callers, Turn, take
from lipsync.bench.tenants import Found, Idle, Memory, Sizes
from lipsync.tenant_list import read_entries


@pytest.fixture
def repository(tmp_path: Path, unchecked: None) -> Path:
    """A repository with the tenant `anna`."""
    folder = tmp_path / "repository"
    add_small_tenant(tmp_path, folder, "anna", 320, 240, 2)
    return folder


def test_copies_are_tenants_that_share_their_files(repository: Path) -> None:
    names = ["berta", "carl"]
    assert list(link_tenants(repository, "anna", names)) == [1, 2]
    assert tenant_names(repository) == ["anna", *names]
    assert [entry.fault for entry in read_entries(repository)] == ["", "", ""]
    own = repository / "anna" / "1" / MODEL
    for name in names:
        Tenant(repository, name).verify()
        assert (repository / name / "1" / MODEL).samefile(own)
        assert not (repository / name / "1" / MANIFEST).samefile(repository / "anna" / "1" / MANIFEST)
        assert f'name: "{name}"\n' in (repository / name / CONFIG).read_text()
        raw = repository / (name + RAW_SUFFIX)
        assert f'name: "{name}{RAW_SUFFIX}"\n' in (raw / CONFIG).read_text()
        assert (raw / "1" / MODEL).samefile(repository / f"anna{RAW_SUFFIX}" / "1" / MODEL)


def test_copies_of_a_tenant_without_a_raw_model_have_none(repository: Path) -> None:
    (repository / f"anna{RAW_SUFFIX}").rename(repository.parent / "raw")
    list(link_tenants(repository, "anna", ["berta"]))
    assert sorted(path.name for path in repository.iterdir()) == ["anna", "audio_encoder", "berta"]


class Scripted:
    """A service of which the tenants' first calls wait, and `broken` fails."""

    def __init__(self) -> None:
        self.called: list[tuple[str, str]] = []

    async def composite(self, tenant: str, timeout_s: float) -> float:
        return await self._answer("composite", tenant)

    async def generate(self, tenant: str, timeout_s: float) -> float:
        return await self._answer("generate", tenant)

    async def _answer(self, way: str, tenant: str) -> float:
        waits = 0.0 if tenant in [name for _, name in self.called] else 0.5
        self.called.append((way, tenant))
        await asyncio.sleep(0)
        if tenant == "broken":
            raise ValueError(f"{tenant} gave no frames")
        return waits


def test_callers_take_tenants_in_turn_and_say_who_waited() -> None:
    side = Scripted()
    found = asyncio.run(take(side, Turn(["a", "b", "broken"], callers=2, seconds=600, calls=7, first=1)))
    assert [name for _, name in side.called] == ["b", "broken", "a", "b", "broken", "a", "b"]
    assert [way for way, _ in side.called] == ["generate", "composite"] * 3 + ["generate"]
    assert (len(found.misses_s), found.waits_s, len(found.hits_s)) == (2, [0.5, 0.5], 3)
    assert found.failures == {"... gave no frames": 2}
    assert (found.calls, found.failed, found.tenants) == (7, 2, 3)
    assert found.hit_rate == pytest.approx(3 / 5)


def test_callers_stop_when_the_time_is_over() -> None:
    side = Scripted()
    assert asyncio.run(take(side, Turn(["a"], callers=3, seconds=0, calls=100))).calls == 0


def test_popular_tenants_are_called_most() -> None:
    side = Scripted()
    asyncio.run(take(side, Turn(["a", "b", "c"], callers=1, seconds=600, calls=1100, zipf=1.0)))
    counts = Counter(name for _, name in side.called)
    assert [counts[name] for name in "abc"] == pytest.approx([600, 300, 200], rel=0.25)


def test_nothing_called_has_a_hit_rate_of_nothing() -> None:
    assert Answers().hit_rate == 0


def test_callers_of_a_service_without_triton_fail_and_go_on(repository: Path, tmp_path: Path) -> None:
    settings = {"triton.restart_wait_s": 0}
    with (
        service.running(repository, "127.0.0.1:1", tmp_path, settings=settings) as served,
        Child(tenant_callers.__name__, [served.address]) as child,
    ):
        for _ in range(2):
            found = Callers(child).take(Turn(["anna", "nobody"], callers=2, seconds=600, calls=4))
            assert found.calls == found.failed == 4
            assert {words.partition(":")[0] for words in found.failures} == {"UNAVAILABLE", "NOT_FOUND"}


COUNTS = {"hits": 5, "misses": 3, "loads": 3, "failed_loads": 1, "evictions": 2, "lost_races": 0}


class Stats(http.server.BaseHTTPRequestHandler):
    """Answers with the counts so far; from then on there are more."""

    counts: ClassVar[dict[str, int]] = COUNTS

    def do_GET(self) -> None:
        body = json.dumps({"endpoints": [{"counts": self.counts}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing to stderr."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Service]:
    """A service of which there are only statistics and a log."""
    log = tmp_path / "compositor.log"
    log.write_text("INFO loads: old loaded in 9.000 s after 9.000 s in the queue\n")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stats) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Service("", f"127.0.0.1:{server.server_address[1]}", 0, log)
        server.shutdown()
        thread.join()


def test_counts_are_those_since_the_begin(served: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Tally(served)
    assert tally.so_far() == Counts(0, 0, 0, [], [])
    monkeypatch.setattr(Stats, "counts", {**COUNTS, "evictions": 7, "lost_races": 1})
    with served.log.open("a") as log:
        log.write("INFO loads: a loaded in 0.250 s after 1.500 s in the queue\nINFO loads: b is not loaded\n")
        log.write("INFO loads: b loaded in 0.500 s after 0.000 s in the queue\n")
    assert tally.so_far() == Counts(5, 1, 0, [0.25, 0.5], [1.5, 0.0])


FOUND = Found(
    making_s=8.0,
    triton_s=0.5,
    compositor_s=1.5,
    listing_s=Spread.of([0.8, 0.9, 1.0]),
    idle=Idle(0.01, 0.02),
    answers=Answers([0.01] * 3, [0.4], [0.35], {"UNAVAILABLE: gone": 1}, 4, 10.0),
    counts=Counts(2, 0, 0, [0.2, 0.3], [0.1, 0.1]),
    memory=Memory(350_000_000, 60_000_000, 90_000_000, [40_000_000, 50_000_000]),
    hit_s=Spread.of([0.000_02, 0.000_03]),
)


def test_the_targets_are_about_what_thousands_of_tenants_cost() -> None:
    targets = {target.what: target for target in tenants.targets_of(Sizes(), FOUND)}
    values = [target.spread.median for target in targets.values()]
    assert values == pytest.approx([0.5, 1.5, 0.9, 290, 0.025, 1])
    assert [target.met for target in targets.values()] == [True] * 5 + [False]
    worse = replace(FOUND, memory=replace(FOUND.memory, files=40_000_000), hit_s=Spread.once(0.000_11))
    assert [target.met for target in tenants.targets_of(Sizes(), worse)] == [True] * 3 + [False] * 3


def test_the_figures_name_hits_misses_and_memory() -> None:
    figures = {(figure.subject, figure.quantity): figure.spread.median for figure in tenants.figures_of(Sizes(), FOUND)}
    assert figures["calls", "model loaded (hit rate)"] == 75
    assert figures["calls", "hit rate if the most wanted stayed loaded"] == pytest.approx(42, abs=0.5)
    assert figures[tenants.LOADS, "p50"] == pytest.approx(250)
    assert figures["a model's process", "private memory"] == pytest.approx(45)
    assert list(tenants.notes_of(FOUND)) == ["Failed 1 times: UNAVAILABLE: gone"]


def test_the_command_takes_the_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sizes] = []

    def part(sizes: Sizes) -> Part:
        asked.append(sizes)
        return Part("tenants", "Tenants", lambda run: PartReport("tenants", "Tenants"))

    monkeypatch.setattr("lipsync.commands.bench.install", lambda *_: None)
    monkeypatch.setattr(tenants, "part", part)
    options = ["-n", "500", "--cache", "20", "--callers", "3", "--pause", "1", "-t", "5m", "--headroom", "6"]
    done = CliRunner().invoke(build(), ["bench", "tenants", *options, "-o", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert asked == [Sizes(500, 20, 3, 1.0, 300, headroom=6)]


def test_a_tenant_that_cannot_be_called_ends_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise InvalidInput("no space; free some")

    monkeypatch.setattr(tenants, "add_small_tenant", refuse)
    found = carry_out(tenants.part(), Run(tmp_path, lambda *_: None, quick=True))
    assert found.failure == "no space; free some"


@pytest.mark.triton
def test_the_part_measures_against_triton(triton_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []
    # So many calls, however long they take: there are loads and evictions among them on any machine.
    demand = tenants._demand
    monkeypatch.setattr(tenants, "_demand", lambda *given: replace(demand(*given), seconds=600, calls=24))
    part = next(part for part in parts.PARTS if part.name == "tenants")
    found = carry_out(part, Run(tmp_path, lambda *progress: told.append(progress), quick=True))
    assert found.failure == ""
    assert {figure.quantity for figure in found.figures} >= {found.plotted}
    figures = {(figure.subject, figure.quantity): figure.spread.median for figure in found.figures}
    assert figures["calls", "made"] > 0
    assert figures["calls", "failed"] == 0, found.notes
    assert figures["models", "loads"] > 0
    assert figures["models", "evictions"] > 0
    assert 0 < figures[tenants.LOADS, "p50"] <= figures[tenants.LOADS, "p99"]
    assert figures["Triton's server", "memory (RSS)"] > 10
    assert 0 < figures["compositor", "of it files of open tenants"] < figures["compositor", "memory (RSS)"]
    assert figures["residency", "added to a hit"] > 0
    assert len(found.targets) == 6
    assert told[-1][1] == told[-1][2]
