"""What the service counts and times, as Prometheus metrics. No tenant's name is a label: there may be thousands."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
    multiprocess,
)

SHARED_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""The variable of the environment that makes this library keep a process's numbers in files of a folder."""
_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
_DELAY_S = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 3, 5, 10)


class Metrics:
    """All metrics of one service, in a registry of their own."""

    def __init__(self, folder: Path | None = None) -> None:
        """folder: where processes of one service share their numbers; each has it in SHARED_VARIABLE, too."""
        self._folder = folder
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.sessions = Gauge("lipsync_sessions", "Live sessions.", registry=self.registry, multiprocess_mode="livesum")
        self.sessions_opened = Counter(
            "lipsync_sessions_opened", "Live sessions that were opened.", registry=self.registry
        )
        self.pictures = Counter(
            "lipsync_pictures",
            "Pictures whose time came in live sessions: speaking, idle, fade (the mouth comes to rest), late (a mouth "
            "that was not ready; the speech went on without it).",
            ["kind"],
            registry=self.registry,
        )
        self.dropped = Counter("lipsync_pictures_dropped", "Pictures that slow viewers missed.", registry=self.registry)
        self.dropped_audio = Counter(
            "lipsync_audio_dropped", "Pieces of speech that slow viewers missed.", registry=self.registry
        )
        self.interrupts = Counter("lipsync_interrupts", "Interruptions of live sessions.", registry=self.registry)
        self.failures = Counter(
            "lipsync_segments_failed", "Segments of speech that failed.", ["reason"], registry=self.registry
        )
        self.lateness_s = Histogram(
            "lipsync_lateness_seconds",
            "How long after its time a live picture was handed to its viewer's queue.",
            buckets=_SHORT_S,
            registry=self.registry,
        )
        self.first_picture_s = Histogram(
            "lipsync_first_picture_seconds",
            "From a segment's first speech to its first picture, the lookahead included.",
            buckets=_DELAY_S,
            registry=self.registry,
        )
        self.batch = Histogram(
            "lipsync_batch_frames",
            "Frames of live sessions in one request to Triton.",
            buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 50),
            registry=self.registry,
        )

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes; where a folder is shared, of all processes together."""
        registry = self.registry
        if self._folder is not None:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry, str(self._folder))  # type: ignore[no-untyped-call]
        return bytes(generate_latest(registry))


def forget_process(pid: int, folder: Path) -> None:
    """A process that shared its numbers is gone: what it counted stays, what it measured of itself goes."""
    multiprocess.mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
