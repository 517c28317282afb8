"""What a compositor says of its models: its statistics over HTTP and its log come in, counts and seconds come out."""

from __future__ import annotations

import json
import re
import urllib.request
from dataclasses import dataclass

from .service import Service

_LOADED = re.compile(r"\S+ loaded in (\d+\.\d+) s after (\d+\.\d+) s in the queue$", re.MULTILINE)
_TIMEOUT_S = 10


@dataclass(frozen=True)
class Counts:
    """What happened to models from one moment to another, as the compositor counts it, and each load as its log tells:
    seconds that it took, and that it waited for others and for room before."""

    evictions: int
    lost_races: int
    failed_loads: int
    loads_s: list[float]
    queued_s: list[float]


class Tally:
    """Counts from now on."""

    def __init__(self, served: Service) -> None:
        self._served = served
        self._before = self._read()
        self._read_bytes = served.log.stat().st_size

    def so_far(self) -> Counts:
        """What happened since."""
        now = self._read()
        loads = _LOADED.findall(self._served.log.read_bytes()[self._read_bytes :].decode(errors="replace"))
        happened = {name: now[name] - before for name, before in self._before.items()}
        return Counts(
            happened["evictions"],
            happened["lost_races"],
            happened["failed_loads"],
            [float(taken) for taken, _ in loads],
            [float(waited) for _, waited in loads],
        )

    def _read(self) -> dict[str, int]:
        with urllib.request.urlopen(f"http://{self._served.http}/stats", timeout=_TIMEOUT_S) as answer:
            counts: dict[str, int] = json.load(answer)["endpoints"][0]["counts"]
        return counts
