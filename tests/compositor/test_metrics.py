"""The service's metrics: all of them there, none of them a tenant's."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from compositor.metrics import Metrics
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
        "lipsync_sessions",
        "lipsync_sessions_opened",
        "lipsync_pictures",
        "lipsync_pictures_dropped",
        "lipsync_audio_dropped",
        "lipsync_interrupts",
        "lipsync_segments_failed",
        "lipsync_lateness_seconds",
        "lipsync_first_picture_seconds",
        "lipsync_batch_frames",
        "lipsync_triton_up",
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


def test_services_do_not_share_their_counts() -> None:
    first, second = Metrics(), Metrics()
    first.interrupts.inc()
    assert "lipsync_interrupts_total 1.0" in first.exposition().decode()
    assert "lipsync_interrupts_total 0.0" in second.exposition().decode()


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
