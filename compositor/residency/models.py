"""What is known of a model and of the server that holds it: the words that residency, inference, catalogue and metrics
share. Does nothing itself."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import Overloaded


class OutOfMemory(Overloaded):
    """The device has no memory left for the model; it may have when another is unloaded."""


class State(enum.Enum):
    """How far a model is loaded, as this compositor sees it."""

    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    """It takes no new leases, and is unloaded as soon as its last one ends."""
    UNLOADING = "unloading"
    """Told to unload; its memory counts until the server says that it is gone."""


@dataclass(frozen=True)
class Device:
    """A part of a server with memory, and so a budget, of its own."""

    name: str
    """`gpu0`, or `default`: wherever each model's config.pbtxt puts it, CPU or GPUs, all of them one budget."""
    gpu: int | None
    """The GPU that a load names; None: as config.pbtxt says."""


def devices_of(gpus: Sequence[int]) -> list[Device]:
    """The devices of a server: these GPUs; without any, the whole of it."""
    return [Device(f"gpu{gpu}", gpu) for gpu in gpus] or [Device("default", None)]


@dataclass(frozen=True)
class Use:
    """How much a loaded model is used, by the server's own statistics, and so by all compositors together."""

    count: int
    """Frames inferred since the load."""
    last_s: float
    """The last inference, seconds since 1970; 0.0: never."""


@dataclass(frozen=True)
class Facts:
    """What the files say of a model."""

    bytes: int
    """Memory that it takes when loaded, as measured when it was added; 0: not known."""
    evictable: bool
    """Whether it may be unloaded to make room. What is not (an audio encoder) does not count for `max_models`."""
    stamp: tuple[int, ...] | None
    """Other files, another stamp; None: not installed."""
    gone: bool = False
    """It was removed, from a repository that is there and holds others."""
    encoder: str = ""
    """The audio encoder that a tenant's first speech needs."""


@dataclass(frozen=True)
class ModelReport:
    """One model of a server, for people and tests."""

    name: str
    state: State
    """ABSENT: loaded by others, and not asked for here."""
    device: str
    bytes: int
    leases: int
    uses: int
    """Frames inferred since the load, by all compositors."""
    last_use_s: float
    """Seconds since 1970; 0.0: never."""
    pinned: bool


class Server(Protocol):
    """What holds models: one Triton."""

    endpoint: str
    """host:port."""

    async def load(self, model: str, gpu: int | None = None) -> None:
        """Returns when loaded. Raises TenantBroken, OutOfMemory, TritonUnavailable, DeadlinePassed."""

    async def unload(self, model: str) -> None:
        """Returns before the memory is free. An unknown model is no error."""

    async def warm(self, model: str) -> None:
        """One request for one frame, so that the server's last use of the model is set."""

    async def states(self) -> dict[str, str]:
        """The server's index: READY, LOADING, UNLOADING; without what is absent or `unloaded`."""

    async def uses(self) -> dict[str, Use]:
        """The statistics of all loaded models."""

    async def placed(self, model: str) -> int | None:
        """The GPU that a loaded model is bound to; None: as config.pbtxt says."""


class Observer(Protocol):
    """Who is told what happens to the models of one server."""

    def hit(self) -> None:
        """A lease found its model loaded."""

    def miss(self) -> None:
        """A lease has to wait for its model."""

    def loaded(self, seconds: float, waited_s: float) -> None:
        """A load succeeded, in `seconds`, after `waited_s` in the queue of loads and for room."""

    def load_failed(self) -> None:
        """A load failed."""

    def evicted(self, age_s: float) -> None:
        """A model was told to unload to make room or for being idle, `age_s` after its load."""

    def lost_race(self) -> None:
        """A model that was loaded here was unloaded by another compositor."""

    def occupied(self, device: str, models: int, size: int) -> None:
        """What a device holds now: models that count for `max_models`, and bytes of all."""

    def leased(self, count: int) -> None:
        """Leases under way, told at each sweep."""


class Unobserved:
    """An observer that looks away."""

    def hit(self) -> None: ...

    def miss(self) -> None: ...

    def loaded(self, seconds: float, waited_s: float) -> None: ...

    def load_failed(self) -> None: ...

    def evicted(self, age_s: float) -> None: ...

    def lost_race(self) -> None: ...

    def occupied(self, device: str, models: int, size: int) -> None: ...

    def leased(self, count: int) -> None: ...
