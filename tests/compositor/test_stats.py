"""What `/stats` says of Triton servers and their models."""

from __future__ import annotations

import json

from compositor.metrics import Metrics
from compositor.residency.models import ModelReport, State
from compositor.transports.stats import describe
from compositor.triton.breaker import Circuit
from compositor.triton.endpoint import EndpointReport


def model(name: str, uses: int, state: State = State.READY) -> ModelReport:
    return ModelReport(name, state, "default", 30_000_000, 2, uses, 1234.5, False)


def test_servers_are_told_with_their_counts_and_models_by_use() -> None:
    metrics = Metrics()
    observer = metrics.observer("a:1", 40, 0)
    metrics.observer("b:1", 40, 0)
    observer.miss()
    observer.loaded(0.5, 0.1)
    for _ in range(5):
        observer.hit()
    observer.evicted(20)
    observer.load_failed()
    observer.lost_race()
    observer.occupied("default", 2, 60_000_000)
    reports = [
        EndpointReport("a:1", True, 4, True, [model("anna", 7), model("berta", 42, State.ABSENT)]),
        EndpointReport("b:1", False, 0, False, [model("carla", 9, State.LOADING)], Circuit.OPEN),
    ]
    told = json.loads(json.dumps(describe(reports, metrics)))
    assert told["endpoints"] == [
        {
            "endpoint": "a:1", "up": True, "circuit": "closed", "room": True, "leases": 4,
            "counts": {"hits": 5, "misses": 1, "loads": 1, "failed_loads": 1, "evictions": 1, "lost_races": 1},
            "devices": [{"device": "default", "models": 2, "most_models": 40, "bytes": 60_000_000, "most_bytes": 0}],
        },
        {
            "endpoint": "b:1", "up": False, "circuit": "open", "room": False, "leases": 0,
            "counts": {"hits": 0, "misses": 0, "loads": 0, "failed_loads": 0, "evictions": 0, "lost_races": 0},
            "devices": [],
        },
    ]  # fmt: skip
    assert [(each["endpoint"], each["name"], each["state"], each["uses"]) for each in told["models"]] == [
        ("a:1", "berta", "absent", 42),
        ("b:1", "carla", "loading", 9),
        ("a:1", "anna", "ready", 7),
    ]
    assert told["models"][2] == {
        "endpoint": "a:1", "name": "anna", "state": "ready", "device": "default", "bytes": 30_000_000, "leases": 2,
        "uses": 7, "last_use_s": 1234.5, "pinned": False,
    }  # fmt: skip


def test_a_server_that_nobody_counts_for_is_told_all_the_same() -> None:
    (endpoint,) = describe([EndpointReport("a:1", True, 0, True, [])], Metrics())["endpoints"]
    assert (endpoint["counts"], endpoint["devices"]) == ({}, [])
