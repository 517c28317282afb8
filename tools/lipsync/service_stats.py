"""What a compositor says of itself on `/stats`: of all its worker processes, each of which knows its own part only."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from lipsync.client import ServiceFailed

Stats = dict[str, Any]

PATIENCE_S = 5.0
_TRIES = 8
"""Requests for each worker: the kernel gives a connection to any of them."""
_FORGET_S = 60.0
_CIRCUITS = ("closed", "half_open", "open")
"""Of a Triton; what one process avoids counts before what others do not yet."""
_STATES = ("ready", "draining", "loading", "unloading", "absent")
"""Of a model, as processes see it: the first one is the most that is known of it."""


class ServiceStats:
    """All workers of one service, as they were when last seen."""

    def __init__(self, address: str) -> None:
        """address: host:port of the HTTP server."""
        self._address = address
        self._seen: dict[int, tuple[float, Stats]] = {}

    def read(self) -> Stats:
        """What the workers say now; of one that no connection went to, what it said last. Raises ServiceFailed."""
        now_s = time.monotonic()
        met = set[int]()
        stats = self._read_one(now_s, met)
        for _ in range(_TRIES * stats["workers"] - 1):
            if len(met) >= stats["workers"]:
                break
            # The service answers; one of its workers may just come or go.
            with contextlib.suppress(ServiceFailed):
                self._read_one(now_s, met)
        complete = len(met) >= stats["workers"]
        self._seen = {
            process: (seen_s, stats)
            for process, (seen_s, stats) in self._seen.items()
            if process in met or not (complete or now_s - seen_s > _FORGET_S)
        }
        return merge([stats for _, stats in self._seen.values()])

    def _read_one(self, now_s: float, met: set[int]) -> Stats:
        stats = read_stats(self._address)
        self._seen[stats["process"]] = (now_s, stats)
        met.add(stats["process"])
        return stats


def read_stats(address: str) -> Stats:
    """What `/stats` of one process says. Raises ServiceFailed."""
    try:
        connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
        try:
            connection.request("GET", "/stats")
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise ValueError(f"it answers {answer.status}")
        stats = json.loads(body)
        if not (isinstance(stats, dict) and stats.keys() >= {"process", "workers", "sessions", "endpoints", "models"}):
            raise ValueError("its /stats are something else")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ServiceFailed(f"{address}: no compositor's HTTP port ({error}); is it running? give --server") from error
    return stats


def merge(workers: Sequence[Stats]) -> Stats:
    """Several workers' as those of one service.

    What each does is added up. What Triton holds all of them read from its statistics: the one that knows more counts.
    """
    return {
        "sessions": [session for stats in workers for session in stats["sessions"]],
        "late_share": max((stats.get("late_share", 0) for stats in workers), default=0),
        "refused": dict(sum((Counter(stats.get("refused", {})) for stats in workers), Counter[str]())),
        "endpoints": [_one_endpoint(same) for same in _alike(workers, "endpoints", "endpoint")],
        "models": [_one_model(same) for same in _alike(workers, "models", "endpoint", "name")],
    }


def _alike(workers: Sequence[Stats], what: str, *keys: str) -> Iterable[list[Stats]]:
    key = itemgetter(*keys)
    return (
        list(same) for _, same in groupby(sorted((each for stats in workers for each in stats[what]), key=key), key)
    )


def _one_endpoint(same: list[Stats]) -> Stats:
    counts = Counter[str]()
    for each in same:
        counts.update(each["counts"])
    devices: dict[str, Stats] = {}
    for device in (device for each in same for device in each["devices"]):
        known = devices.setdefault(device["device"], device)
        if (device["models"], device["bytes"]) > (known["models"], known["bytes"]):
            devices[device["device"]] = device
    return {
        "endpoint": same[0]["endpoint"],
        "up": any(each["up"] for each in same),
        "circuit": max((each.get("circuit", _CIRCUITS[0]) for each in same), key=_CIRCUITS.index),
        "room": any(each["room"] for each in same),
        "leases": sum(each["leases"] for each in same),
        "counts": dict(counts),
        "devices": list(devices.values()),
    }


def _one_model(same: list[Stats]) -> Stats:
    known = min(same, key=lambda each: _STATES.index(each["state"]))
    return {
        **known,
        "leases": sum(each["leases"] for each in same),
        "uses": max(each["uses"] for each in same),
        "last_use_s": max(each["last_use_s"] for each in same),
        "bytes": max(each["bytes"] for each in same),
        "device": next((each["device"] for each in same if each["device"]), ""),
    }
