"""Several workers' `/stats` as one service's."""

from __future__ import annotations

from typing import Any

import pytest

from lipsync import service_stats
from lipsync.service_stats import ServiceStats, Stats, merge


def worker(process: int, workers: int = 2, **fields: Any) -> Stats:
    return {"process": process, "workers": workers, "sessions": [], "endpoints": [], "models": [], **fields}


def endpoint(**fields: Any) -> Stats:
    values = {"endpoint": "a:1", "up": True, "circuit": "closed", "room": False, "leases": 1, "counts": {"hits": 2}}
    return {**values, "devices": [], **fields}


def model(**fields: Any) -> Stats:
    values = {"endpoint": "a:1", "name": "anna", "state": "ready", "device": "", "bytes": 0, "leases": 1}
    return {**values, "uses": 4, "last_use_s": 7.0, "pinned": False, **fields}


def test_what_each_does_is_added_up() -> None:
    one = worker(1, sessions=[{"tenant": "anna"}], endpoints=[endpoint(counts={"hits": 2, "loads": 1})])
    other = worker(
        2, sessions=[{"tenant": "berta"}], endpoints=[endpoint(leases=3, room=True), endpoint(endpoint="b:1")]
    )
    both = merge([one, other])
    assert both["sessions"] == [{"tenant": "anna"}, {"tenant": "berta"}]
    assert both["endpoints"] == [
        endpoint(leases=4, room=True, counts={"hits": 4, "loads": 1}),
        endpoint(endpoint="b:1"),
    ]


@pytest.mark.parametrize(
    ("circuits", "told"),
    [(["closed", "closed"], "closed"), (["closed", "half_open"], "half_open"), (["half_open", "open"], "open")],
)
def test_a_triton_that_one_process_avoids_is_told_as_such(circuits: list[str], told: str) -> None:
    workers = [worker(number, endpoints=[endpoint(circuit=circuit)]) for number, circuit in enumerate(circuits, 1)]
    assert [each["circuit"] for each in merge(workers)["endpoints"]] == [told]


def test_services_that_know_of_no_circuit_have_it_closed() -> None:
    older = endpoint()
    del older["circuit"]
    first, other = worker(1, endpoints=[older]), worker(2, endpoints=[endpoint(circuit="open")])
    told = [merge(workers)["endpoints"] for workers in ([first], [first, other])]
    assert [each["circuit"] for (each,) in told] == ["closed", "open"]


def test_of_what_triton_holds_the_one_that_knows_more_counts() -> None:
    less = model(state="absent", uses=3, bytes=5, leases=0)
    more = model(device="default", last_use_s=9.0, leases=2)
    (both,) = merge([worker(1, models=[less]), worker(2, models=[more])])["models"]
    assert both == model(state="ready", device="default", uses=4, last_use_s=9.0, bytes=5, leases=2)


@pytest.mark.parametrize(("first", "last"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("size", [0, 50])
def test_of_devices_the_one_with_more_counts(first: int, last: int, size: int) -> None:
    ends = [endpoint(devices=[{"device": "default", "models": each, "bytes": size}]) for each in (first, last)]
    (both,) = merge([worker(1, endpoints=ends[:1]), worker(2, endpoints=ends[1:])])["endpoints"]
    assert both["devices"] == [{"device": "default", "models": 2, "bytes": size}]


def test_the_worker_that_is_worst_tells_what_is_late() -> None:
    first = {**worker(1), "late_share": 0.02, "refused": {"late": 0, "burst": 2}}
    second = {**worker(2), "late_share": 0.3, "refused": {"late": 7, "burst": 1}}
    merged = merge([first, second])
    assert (merged["late_share"], merged["refused"]) == (0.3, {"late": 7, "burst": 3})


def test_one_worker_is_as_it_says() -> None:
    models = [model(), model(name="berta", uses=0)]
    assert merge([worker(1, endpoints=[endpoint()], models=models)]) == {
        "sessions": [],
        "late_share": 0,
        "refused": {},
        "endpoints": [endpoint()],
        "models": models,
    }


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Stats]:
    """What the next connections get; the last answer again and again."""
    left: list[Stats] = []
    monkeypatch.setattr(service_stats, "read_stats", lambda _: left.pop(0) if len(left) > 1 else left[0])
    return left


def tenants(stats: Stats) -> list[str]:
    return sorted(session["tenant"] for session in stats["sessions"])


def test_it_asks_until_all_workers_answered(answers: list[Stats]) -> None:
    one, other = worker(1, sessions=[{"tenant": "anna"}]), worker(2, sessions=[{"tenant": "berta"}])
    answers += [one, one, one, other, worker(3)]
    assert tenants(ServiceStats("here:1").read()) == ["anna", "berta"]
    assert answers == [worker(3)], "and no longer"


def test_who_was_not_met_is_as_it_was_and_who_was_replaced_is_forgotten(
    answers: list[Stats], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    one, other = worker(1, sessions=[{"tenant": "anna"}]), worker(2, sessions=[{"tenant": "berta"}])
    service = ServiceStats("here:1")
    answers += [one, other, one]
    assert tenants(service.read()) == ["anna", "berta"]
    assert tenants(service.read()) == ["anna", "berta"], "only one was met"
    now_s = 100.0
    assert tenants(service.read()) == ["anna"], "and for long"
    answers[:] = [one, worker(3, sessions=[{"tenant": "carla"}])]
    assert tenants(service.read()) == ["anna", "carla"]
