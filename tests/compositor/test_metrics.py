"""The service's metrics: all of them there, none of them a tenant's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import values
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from compositor.metrics import SHARED_VARIABLE, STAGES, Metrics
from compositor.residency.models import Observer


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Every sample of the exposition by its name, Triton and device."""
    return {
        (sample.name, *(sample.labels[name] for name in ("triton", "device") if name in sample.labels)): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }


def test_the_exposition_names_every_metric() -> None:
    families = {family.name: family for family in text_string_to_metric_families(Metrics().exposition().decode())}
    assert {
        "lipsync_calls",
        "lipsync_stage_seconds",
        "lipsync_sessions",
        "lipsync_sessions_opened",
        "lipsync_sessions_refused",
        "lipsync_late_share",
        "lipsync_pictures",
        "lipsync_pictures_dropped",
        "lipsync_audio_dropped",
        "lipsync_interrupts",
        "lipsync_segments_failed",
        "lipsync_lateness_seconds",
        "lipsync_first_picture_seconds",
        "lipsync_batch_frames",
        "lipsync_triton_up",
        "lipsync_triton_works",
        "lipsync_model_hits",
        "lipsync_model_misses",
        "lipsync_model_load_seconds",
        "lipsync_model_load_wait_seconds",
        "lipsync_model_loads_failed",
        "lipsync_model_eviction_age_seconds",
        "lipsync_model_lost_races",
        "lipsync_model_leases",
        "lipsync_models",
        "lipsync_models_limit",
        "lipsync_model_bytes",
        "lipsync_model_bytes_limit",
    } <= families.keys()
    assert all(family.documentation for family in families.values() if family.name.startswith("lipsync"))


def test_every_metric_and_stage_is_documented() -> None:
    docs = Path(__file__).parents[2] / "docs"
    text = (docs / "operations.md").read_text() + (docs / "http.md").read_text()
    names = [metric.name for metric in Metrics().registry.collect() if metric.name.startswith("lipsync_")]
    assert len(names) > 20
    for name in (*(name.removeprefix("lipsync_") for name in names), *STAGES):
        assert f"`{name}`" in text or f"`{name}_total`" in text, name


def test_services_do_not_share_their_counts() -> None:
    first, second = Metrics(), Metrics()
    first.interrupts.inc()
    assert "lipsync_interrupts_total 1.0" in first.exposition().decode()
    assert "lipsync_interrupts_total 0.0" in second.exposition().decode()


def test_every_stage_has_its_series_from_the_start() -> None:
    metrics = Metrics()
    metrics.observe_stage("blend", 0.0007)
    metrics.observer_of("queue")(4)
    counts = {
        sample.labels["stage"]: sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
        if sample.name == "lipsync_stage_seconds_count"
    }
    assert counts == {**dict.fromkeys(STAGES, 0), "blend": 1, "queue": 1}


def test_workers_share_their_numbers_and_each_is_seen(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys; from compositor.metrics import Metrics;"
        "metrics = Metrics(pathlib.Path(sys.argv[1]), int(sys.argv[2])); metrics.calls.labels('Speak', 'OK').inc();"
        "print('ready', flush=True); sys.stdin.read(); print(metrics.exposition().decode())"
    )
    environment = {**os.environ, SHARED_VARIABLE: str(tmp_path)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), str(number)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2)
    ]
    with workers[0] as first, workers[1] as second:
        for worker in workers:
            assert worker.stdout
            assert worker.stdout.readline() == "ready\n"
        told, _ = first.communicate()
        kept = {
            (sample.name, sample.labels.get("worker")): sample.value
            for family in text_string_to_metric_families(told)
            for sample in family.samples
        }
        assert kept["lipsync_calls_total", None] == 2
        assert kept["process_cpu_seconds_total", "2"] > 0
        resident = {kept["process_resident_memory_bytes", number] for number in ("1", "2")}
        assert all(10e6 < size < 1e9 for size in resident)
        assert kept["process_max_fds", "1"] >= kept["process_open_fds", "1"] > 3
        started = Path(f"/proc/{second.pid}/stat").stat().st_ctime
        assert kept["process_start_time_seconds", "2"] == pytest.approx(started, abs=30)
        assert ("process_resident_memory_bytes", None) not in kept
        second.communicate()


def test_a_worker_that_is_gone_is_seen_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHARED_VARIABLE, str(tmp_path))
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)  # it is another's again after this
    metrics = Metrics(tmp_path, 1)
    (tmp_path / "worker-2.pid").write_text("999999999")
    assert {sample.labels["worker"] for sample in processes(metrics)} == {"1"}


def processes(metrics: Metrics) -> list[Sample]:
    return [
        sample
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
        if sample.name.startswith("process_")
    ]


def test_what_happens_to_models_is_counted_by_triton_and_device() -> None:
    metrics = Metrics()
    here: Observer = metrics.observer("a:1", 40, 9_000)
    there: Observer = metrics.observer("b:1", 40, 9_000)
    for _ in range(3):
        here.hit()
    here.miss()
    here.loaded(0.4, 1.7)
    here.load_failed()
    here.evicted(100)
    here.evicted(300)
    here.lost_race()
    here.leased(5)
    here.occupied("gpu0", 12, 3_000)
    here.occupied("gpu1", 13, 4_000)
    there.miss()
    metrics.up.labels("a:1").set(1)
    assert (
        samples(metrics).items()
        >= {
            ("lipsync_model_hits_total", "a:1"): 3,
            ("lipsync_model_misses_total", "a:1"): 1,
            ("lipsync_model_load_seconds_count", "a:1"): 1,
            ("lipsync_model_load_seconds_sum", "a:1"): 0.4,
            ("lipsync_model_load_wait_seconds_sum", "a:1"): 1.7,
            ("lipsync_model_loads_failed_total", "a:1"): 1,
            ("lipsync_model_eviction_age_seconds_count", "a:1"): 2,
            ("lipsync_model_eviction_age_seconds_sum", "a:1"): 400,
            ("lipsync_model_lost_races_total", "a:1"): 1,
            ("lipsync_model_leases", "a:1"): 5,
            ("lipsync_models", "a:1", "gpu0"): 12,
            ("lipsync_models_limit", "a:1", "gpu0"): 40,
            ("lipsync_models", "a:1", "gpu1"): 13,
            ("lipsync_model_bytes", "a:1", "gpu1"): 4_000,
            ("lipsync_model_bytes_limit", "a:1", "gpu1"): 9_000,
            ("lipsync_model_misses_total", "b:1"): 1,
            ("lipsync_model_hits_total", "b:1"): 0,
            ("lipsync_triton_up", "a:1"): 1,
        }.items()
    )
