"""The service's metrics: all of them there, none of them a tenant's."""

from prometheus_client.parser import text_string_to_metric_families

from compositor.metrics import Metrics


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
    } <= families.keys()
    assert all(family.documentation for family in families.values() if family.name.startswith("lipsync"))


def test_services_do_not_share_their_counts() -> None:
    first, second = Metrics(), Metrics()
    first.interrupts.inc()
    assert "lipsync_interrupts_total 1.0" in first.exposition().decode()
    assert "lipsync_interrupts_total 0.0" in second.exposition().decode()
