"""What belongs to one request from its door to its frames: the tenant, the output wanted, the deadline, the account."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from .deadline import Deadline
from .rendering import Output
from .tenant import Tenant
from .tracing import Span


@dataclass
class Stages:
    """Seconds spent in each stage, summed over frames; stages overlap in wall time."""

    open_s: float = 0
    load_s: float = 0
    features_s: float = 0
    inference_s: float = 0
    blend_s: float = 0
    encode_s: float = 0

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Adds the wall time of the block to `stage`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - begin)

    def add(self, stage: str, seconds: float) -> None:
        setattr(self, stage, getattr(self, stage) + seconds)


@dataclass(frozen=True)
class Frame:
    """A finished frame. pts_samples: its presentation time in 16 kHz samples since the speech began."""

    data: bytes
    number: int
    pts_samples: int


@dataclass(frozen=True)
class Call:
    """What all stages of one request share."""

    tenant: Tenant
    output: Output
    stages: Stages
    deadline: Deadline | None = None  # the caller's own, where there is one
    span: Span | None = None  # where the call is traced

    def step_deadline(self, default_s: float) -> Deadline:
        """Until when one step of the call may take: the caller's deadline, or `default_s` from now."""
        return self.deadline or Deadline.after(default_s)
