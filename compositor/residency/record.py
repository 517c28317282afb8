"""What is known here of one model of a server: how far its load is, who waits for it, and why it was not loaded."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from ..errors import LipsyncError
from .models import State


@dataclass(frozen=True)
class Failure:
    """Why a model did not load."""

    error: LipsyncError
    stamp: tuple[int, ...] | None
    until_s: float
    """By the event loop's clock."""


@dataclass(eq=False)
class Model:
    """What is known here of one model."""

    name: str
    state: State = State.ABSENT
    stamp: tuple[int, ...] | None = None
    """Of the files that it was loaded from."""
    loaded_s: float = 0.0
    """Seconds since 1970."""
    leases: int = 0
    """Requests under way or waiting for the load."""
    waiting: int = 0
    """Who waits for `arrival`."""
    arrival: asyncio.Future[None] | None = None
    asked_s: float = 0.0
    """When the load was asked for, by the event loop's clock."""
    after: Model | None = None
    """Its load ran out of memory; the next one begins when this one is gone."""
    unwanted: bool = False
    """Dropped while it was being loaded."""
    failure: Failure | None = None
    changed: float = 0
    """When `state` was last changed, on the clock of `Holdings.tick`."""
