"""What the service counts and times, as Prometheus metrics. No tenant's name is a label: there may be thousands. Labels
are Triton servers, of which the settings have a list, their devices, worker processes, and words of our own."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    generate_latest,
    multiprocess,
    values,
)
from prometheus_client.registry import Collector

Mode = Literal["livesum", "livemin", "livemax"]

SHARED_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""The variable of the environment that makes this library keep a process's numbers in files of a folder."""
STAGES = ("features", "gather", "load", "queue", "inference", "pool", "blend", "encode", "send")
REFUSALS = ("max_sessions", "late", "burst")
"""Why a live session is not opened."""
_ENTRY_BYTES = 28
"""Of a series in such a file, beside its name: a length, padding to 8 bytes, value and time. (mmap_dict.py)"""
_TINY_S = (0.0001, 0.00025, 0.0005)
_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
_LONG_S = (2.5, 5, 10, 20, 40)
_DELAY_S = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 3, 5, 10)
_LOAD_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 40, 80)
_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 50)
_AGE_S = (10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240, 20480, 40960, 81920)


class Metrics:
    """All metrics of one service, in a registry of their own."""

    def __init__(self, folder: Path | None = None, worker: int = 0) -> None:
        """folder: where processes of one service share their numbers; each has it in SHARED_VARIABLE, too. worker: the
        number of this one among them."""
        self._folder = folder
        self._labelled: list[tuple[Counter | Gauge | Histogram, Sequence[str]]] = []
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        if folder is not None:
            _Processes.add(folder, worker)
        # Files are named after the worker, not the process: restarts would leave ever more to be read.
        values.ValueClass = (
            values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call]
            if folder is not None
            else values.MutexValue
        )
        self._count_calls()
        self._count_sessions()
        self._time_stages()
        self._count_models()
        self.observers: dict[str, ModelMetrics] = {}
        """Who counts what happens to the models of a Triton, by its address."""

    def _count_calls(self) -> None:
        self.calls = self._counter(
            "lipsync_calls",
            "Calls that have ended, by what was called and the status told to the caller: of google.rpc.Code; "
            "CANCELLED where the caller left, or did not send its request in time.",
            ["method", "status"],
        )

    def _count_sessions(self) -> None:
        self.sessions = self._gauge("lipsync_sessions", "Live sessions.", [], "livesum")
        self.sessions_opened = self._counter("lipsync_sessions_opened", "Live sessions that were opened.")
        refused = self._counter(
            "lipsync_sessions_refused",
            "Live sessions that were not opened for want of room, by reason: max_sessions; late (those under way were, "
            "above live.max_late); burst (others had only just begun, live.burst).",
            ["reason"],
        )
        self.refused = {reason: refused.labels(reason) for reason in REFUSALS}
        """By reason, each with its series from the start."""
        self.late_share = self._gauge(
            "lipsync_late_share",
            "Part of the pictures of live sessions that were shown, or predicted, too late, as live.max_late has it: "
            "of the process, or of the tenant that is worst.",
            [],
            "livemax",
        )
        self.pictures = self._counter(
            "lipsync_pictures",
            "Pictures whose time came in live sessions: speaking, idle, fade (the mouth comes to rest), late (a mouth "
            "that was not ready; the speech went on without it).",
            ["kind"],
        )
        self.dropped = self._counter("lipsync_pictures_dropped", "Pictures that slow viewers missed.")
        self.dropped_audio = self._counter("lipsync_audio_dropped", "Pieces of speech that slow viewers missed.")
        self.interrupts = self._counter("lipsync_interrupts", "Interruptions of live sessions.")
        self.failures = self._counter("lipsync_segments_failed", "Segments of speech that failed.", ["reason"])
        self.lateness_s = self._histogram(
            "lipsync_lateness_seconds",
            "How long after its time a live picture was handed to its viewer's queue.",
            _SHORT_S,
        )
        self.first_picture_s = self._histogram(
            "lipsync_first_picture_seconds",
            "From a segment's first speech to its first picture, the lookahead included.",
            _DELAY_S,
        )

    def _time_stages(self) -> None:
        stages = self._histogram(
            "lipsync_stage_seconds",
            "features (mel columns, the encoder's embeddings), inference: what a request waits for them. load: for a "
            "model that is not loaded. queue: what it waits for one of triton.slots first; features and inference have "
            "it in them. gather: what speech or a frame of a live session waits for others', to be one request. pool: "
            "what predicted mouths wait for a thread. blend, encode: of a frame. send: from a frame's being ready, or "
            "due, until its client's connection took it.",
            (*_TINY_S, *_SHORT_S, *_LONG_S),
            ["stage"],
        )
        self._stages = {stage: stages.labels(stage) for stage in STAGES}
        self.batch = self._histogram(
            "lipsync_batch_frames", "Frames of live sessions in one request to Triton.", _BATCHES
        )

    def _count_models(self) -> None:
        triton, places = ["triton"], ["triton", "device"]
        self.up = self._gauge("lipsync_triton_up", "Whether a Triton answers: 1 or 0.", triton, "livemin")
        self.works = self._gauge(
            "lipsync_triton_works",
            "Whether inference works at a Triton, as far as is known: 1, or 0 where requests go elsewhere, if others "
            "can take them.",
            triton,
            "livemin",
        )
        self.hits = self._counter("lipsync_model_hits", "Requests whose model was loaded.", triton)
        self.misses = self._counter("lipsync_model_misses", "Requests that had to wait for their model.", triton)
        self.load_s = self._histogram("lipsync_model_load_seconds", "Loads that succeeded.", _LOAD_S, triton)
        self.load_wait_s = self._histogram(
            "lipsync_model_load_wait_seconds",
            "What these loads waited first: for others, and for room.",
            _LOAD_S,
            triton,
        )
        self.failed_loads = self._counter("lipsync_model_loads_failed", "Loads that failed.", triton)
        self.eviction_age_s = self._histogram(
            "lipsync_model_eviction_age_seconds",
            "Time from load to unload, to make room or for being idle.",
            _AGE_S,
            triton,
        )
        self.lost_races = self._counter(
            "lipsync_model_lost_races", "Models loaded from here that another compositor unloaded.", triton
        )
        self.leases = self._gauge("lipsync_model_leases", "Requests under way.", triton, "livesum")
        self.models = self._gauge("lipsync_models", "Tenants' models that take room.", places, "livemax")
        self.most_models = self._gauge("lipsync_models_limit", "Most tenants' models.", places, "livemax")
        self.model_bytes = self._gauge("lipsync_model_bytes", "Memory of all models, as measured.", places, "livemax")
        self.most_bytes = self._gauge("lipsync_model_bytes_limit", "Most of it; 0: no limit.", places, "livemax")

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        counter = Counter(name, text, labels, registry=self.registry)
        self._labelled.append((counter, labels))
        return counter

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        histogram = Histogram(name, text, labels, buckets=buckets, registry=self.registry)
        self._labelled.append((histogram, labels))
        return histogram

    def _gauge(self, name: str, text: str, labels: Sequence[str], mode: Mode) -> Gauge:
        """mode: what processes that share a service say together."""
        gauge = Gauge(name, text, labels, registry=self.registry, multiprocess_mode=mode)
        self._labelled.append((gauge, labels))
        return gauge

    def expect(self, tritons: Sequence[str], devices: Sequence[str]) -> None:
        """Makes all series of these Tritons, each with these devices."""
        known = {"triton": tritons, "device": devices}
        for metric, labels in self._labelled:
            if labels and known.keys() >= set(labels):
                for words in itertools.product(*(known[label] for label in labels)):
                    metric.labels(*words)

    def file_bytes(self) -> dict[str, int]:
        """What the series that there are take in a file of SHARED_VARIABLE's folder, at most, by the kind of metric."""
        sizes: dict[str, int] = {}
        for family in self.registry.collect():
            for sample in family.samples:
                key = json.dumps([family.name, sample.name, sample.labels, family.documentation])
                sizes[family.type] = sizes.get(family.type, 0) + len(key) + _ENTRY_BYTES
        return sizes

    def observer(self, triton: str, most_models: int, most_bytes: int) -> ModelMetrics:
        """Who counts what happens to the models of the Triton at that address. most_*: a device's budget."""
        self.observers[triton] = ModelMetrics(self, triton, most_models, most_bytes)
        return self.observers[triton]

    def observe_stage(self, stage: str, seconds: float) -> None:
        """One of STAGES took so long."""
        self._stages[stage].observe(seconds)

    def observer_of(self, stage: str) -> Callable[[float], None]:
        """Who is told how long one of STAGES took."""
        observe: Callable[[float], None] = self._stages[stage].observe
        return observe

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes; where a folder is shared, of all processes together."""
        registry = self.registry
        if self._folder is not None:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry, str(self._folder))  # type: ignore[no-untyped-call]
            registry.register(_Processes(self._folder))
        return bytes(generate_latest(registry))


class ModelMetrics:
    """Counts what happens to the models of one Triton; a `models.Observer`. For people, `counts` and `devices`."""

    def __init__(self, metrics: Metrics, triton: str, most_models: int, most_bytes: int) -> None:
        self._triton = triton
        self._most_models, self._most_bytes = most_models, most_bytes
        self._metrics = metrics
        self.counts = dict.fromkeys(("hits", "misses", "loads", "failed_loads", "evictions", "lost_races"), 0)
        """Since this process began."""
        self.devices: dict[str, dict[str, int]] = {}
        """What each device holds, and may."""
        # A label is looked up once: hits are many.
        self._hits, self._misses = metrics.hits.labels(triton), metrics.misses.labels(triton)
        self._load_s, self._load_wait_s = metrics.load_s.labels(triton), metrics.load_wait_s.labels(triton)
        self._failed_loads = metrics.failed_loads.labels(triton)
        self._eviction_age_s = metrics.eviction_age_s.labels(triton)
        self._lost_races = metrics.lost_races.labels(triton)
        self._leases = metrics.leases.labels(triton)

    def hit(self) -> None:
        self.counts["hits"] += 1
        self._hits.inc()

    def miss(self) -> None:
        self.counts["misses"] += 1
        self._misses.inc()

    def loaded(self, seconds: float, waited_s: float) -> None:
        self.counts["loads"] += 1
        self._load_s.observe(seconds)
        self._load_wait_s.observe(waited_s)

    def load_failed(self) -> None:
        self.counts["failed_loads"] += 1
        self._failed_loads.inc()

    def evicted(self, age_s: float) -> None:
        self.counts["evictions"] += 1
        self._eviction_age_s.observe(age_s)

    def lost_race(self) -> None:
        self.counts["lost_races"] += 1
        self._lost_races.inc()

    def occupied(self, device: str, models: int, size: int) -> None:
        metrics = self._metrics
        gauges = {
            "models": (metrics.models, models),
            "most_models": (metrics.most_models, self._most_models),
            "bytes": (metrics.model_bytes, size),
            "most_bytes": (metrics.most_bytes, self._most_bytes),
        }
        self.devices[device] = {name: value for name, (_, value) in gauges.items()}
        for gauge, value in gauges.values():
            gauge.labels(self._triton, device).set(value)

    def leased(self, count: int) -> None:
        self._leases.set(count)


class _Processes(Collector):
    """What the kernel says of each process that shares a folder: the library itself says nothing of them then."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @staticmethod
    def add(folder: Path, worker: int) -> None:
        """This process is that worker, in the place of any that was it before."""
        path = folder / f"worker-{worker}.pid"
        written = path.with_suffix(".new")
        written.write_text(str(os.getpid()))
        # At once: the others may be reading it.
        written.replace(path)

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for path in sorted(self._folder.glob("worker-*.pid")):
            labels = {"worker": path.stem.removeprefix("worker-")}
            for found in ProcessCollector(pid=path.read_text, registry=None).collect():
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                for sample in found.samples:
                    family.add_sample(sample.name, labels, sample.value)
        return families.values()


def forget_worker(worker: int, folder: Path) -> None:
    """A process that shared its numbers is gone: what it counted stays, and the one in its place counts on; what it
    measured of itself goes."""
    multiprocess.mark_process_dead(worker, str(folder))  # type: ignore[no-untyped-call]
