"""Which server a tenant is on: names and what the servers hold go in, one of the servers that are up comes out.

Awaits nothing, so that whoever asks next is told the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

from ..manifest import RAW_SUFFIX
from .endpoint import Endpoint

CALM_S = 10.0
"""A server has had room and little to do for so long, before a tenant that had gone elsewhere returns to it."""


def ranked(tenant: str, endpoints: Sequence[str]) -> list[str]:
    """The servers in the order in which a tenant goes to them, the same for every compositor.

    Rendezvous hashing (Thaler and Ravishankar, 1998): where one is missing, only its own tenants go elsewhere, and to
    all others alike.
    """
    return sorted(endpoints, key=lambda name: hashlib.blake2b(f"{tenant}\0{name}".encode(), digest_size=8).digest())


def models_of(tenant: str) -> tuple[str, str]:
    """The models that a tenant may have: the fused one and the uploaded graph."""
    return tenant, tenant + RAW_SUFFIX


def tenant_of(model: str) -> str:
    """The tenant that a model, fused or raw, belongs to."""
    return model.removesuffix(RAW_SUFFIX)


class Placement:
    """Where tenants are. `slots`: requests that a server gets at once from here, beyond which they wait."""

    def __init__(self, endpoints: Sequence[Endpoint], slots: int, now_s: Callable[[], float] = time.monotonic) -> None:
        """now_s: seconds that only grow."""
        self._endpoints = {endpoint.name: endpoint for endpoint in endpoints}
        self._slots = slots
        self._now_s = now_s
        self._at: dict[str, Endpoint] = {}
        self._displaced: dict[str, None] = {}
        """Tenants that are elsewhere as their home was down."""
        self._spilled: dict[str, None] = {}
        """Tenants that are elsewhere as their home had no room, or too much to do."""
        self._calm_since_s: dict[Endpoint, float] = {}
        self._waiting = Counter[str]()

    def at(self, tenant: str) -> Endpoint | None:
        """Where its last request went."""
        return self._at.get(tenant)

    def has_others(self, tried: Collection[Endpoint]) -> bool:
        """Whether there is a server to ask besides those."""
        return any(endpoint.up and endpoint not in tried for endpoint in self._endpoints.values())

    def may_return(self, full: Collection[Endpoint], wait_s: float) -> bool:
        """Whether a server besides those went down less than `wait_s` ago."""
        others = (endpoint for endpoint in self._endpoints.values() if endpoint not in full)
        return any(not endpoint.up and endpoint.down_for_s() < wait_s for endpoint in others)

    def find(self, tenant: str, model: str, full: Collection[Endpoint]) -> Endpoint | None:
        """Where a request of a tenant for a model goes; None where no server is up but those that are `full`.

        It stays where the model is, or is awaited. Otherwise the tenant is placed anew: where it is loaded already, or
        on the first of its ranking with room and no queue that is far longer than another's. A server whose inference
        fails comes after all others.
        """
        here = self._at.get(tenant)
        if here is not None and here.works and (model in here.residency or self._waiting[model]) and here not in full:
            return here
        return self._place(tenant, full)

    @contextlib.contextmanager
    def waiting(self, model: str) -> Iterator[None]:
        """Meanwhile a request waits for the model to be loaded, where its tenant is."""
        self._waiting[model] += 1
        try:
            yield
        finally:
            self._waiting[model] -= 1
            if not self._waiting[model]:
                del self._waiting[model]

    def _place(self, tenant: str, full: Collection[Endpoint]) -> Endpoint | None:
        order = self._ranked(tenant)
        usable = [endpoint for endpoint in order if endpoint.up and endpoint not in full]
        usable = [endpoint for endpoint in usable if endpoint.works] or usable
        if not usable:
            return None
        loaded = next((endpoint for endpoint in usable if tenant in endpoint.residency), None)
        here, home = loaded or self._roomy(usable), order[0]
        self.settle(tenant, here)
        if loaded is None and here is not home and home.works:
            self.disturb(home)
        return here

    def settle(self, tenant: str, endpoint: Endpoint) -> None:
        """The tenant's next requests go there, until it returns to its home."""
        self._at[tenant], home = endpoint, self._ranked(tenant)[0]
        if endpoint is home:
            self.stay(tenant)
        elif home.works:
            self._spilled.setdefault(tenant)
        else:
            self._displaced[tenant] = None

    def witness(self, tenant: str, model: str, endpoint: Endpoint) -> Endpoint | None:
        """Another server to make a request at that failed at this one: in the tenant's order, one that has the model,
        or else room for it."""
        others = [each for each in self._ranked(tenant) if each is not endpoint and each.ready and each.works]
        holding = (each for each in others if model in each.residency)
        return next(holding, None) or next((each for each in others if each.residency.room()), None)

    def _roomy(self, usable: Sequence[Endpoint]) -> Endpoint:
        """The first that has room, and at most twice the least busy one's requests and what it takes at once."""
        roomy = [endpoint for endpoint in usable if endpoint.residency.room()] or usable
        most = 2 * min(endpoint.residency.load for endpoint in roomy) + self._slots
        return next(endpoint for endpoint in roomy if endpoint.residency.load <= most)

    def _ranked(self, tenant: str) -> list[Endpoint]:
        return [self._endpoints[name] for name in ranked(tenant, list(self._endpoints))]

    def look(self) -> None:
        """Takes in which servers are calm now: a tenant that came anew would go there, with half of the slack to spare.
        To be called again and again."""
        now_s, up = self._now_s(), [endpoint for endpoint in self._endpoints.values() if endpoint.works]
        most = min((endpoint.residency.load for endpoint in up), default=0.0) + self._slots // 2
        self._calm_since_s = {
            endpoint: self._calm_since_s.get(endpoint, now_s)
            for endpoint in up
            if endpoint.residency.load <= most and endpoint.residency.room()
        }

    def displaced(
        self, may: Callable[[str, Endpoint], bool] = lambda tenant, home: True
    ) -> tuple[str, Endpoint, Endpoint] | None:
        """A tenant that had to go as its home was down, and is in use elsewhere now that its home has answered again:
        its name, where it is, and its home. may: whether that tenant may return to its home now."""
        return self._first(self._displaced, lambda tenant, home: home.ready and home.works and may(tenant, home))

    def spilled(
        self, may: Callable[[str, Endpoint], bool] = lambda tenant, home: True
    ) -> tuple[str, Endpoint, Endpoint] | None:
        """A tenant that went elsewhere as its home was full or busy, and is in use there now that its home was calm at
        each look for `CALM_S`, in which nobody had to go elsewhere, nor returned. may: as for `displaced`."""
        now_s = self._now_s()
        calm = {endpoint for endpoint, since_s in self._calm_since_s.items() if now_s - since_s >= CALM_S}
        return self._first(self._spilled, lambda tenant, home: home in calm and may(tenant, home))

    def _first(
        self, away: dict[str, None], takes: Callable[[str, Endpoint], bool]
    ) -> tuple[str, Endpoint, Endpoint] | None:
        """The first of the tenants that is in use where it is, and whose home takes it. Forgets those not in use."""
        for tenant in list(away):
            here, home = self._at.get(tenant), self._ranked(tenant)[0]
            loaded = here is not None and any(model in here.residency for model in models_of(tenant))
            if here is not None and loaded and here.up and takes(tenant, home):
                return tenant, here, home
            if not loaded and not any(self._waiting[model] for model in models_of(tenant)):
                del away[tenant]  # its next request finds it a place
        return None

    def disturb(self, endpoint: Endpoint) -> None:
        """It has to be calm anew before the next one returns to it that had found no room there."""
        self._calm_since_s.pop(endpoint, None)

    def move(self, tenant: str, endpoint: Endpoint) -> None:
        """The tenant's next requests go there."""
        self._at[tenant] = endpoint
        self.disturb(endpoint)
        self.stay(tenant)

    def wait_for_room(self, tenant: str, home: Endpoint) -> None:
        """The tenant's home has no room for it: it returns when that is calm, after those who wait for that already."""
        self.stay(tenant)
        self._spilled[tenant] = None
        self.disturb(home)

    def stay(self, tenant: str) -> None:
        """The tenant returns no more, wherever it is."""
        self._displaced.pop(tenant, None)
        self._spilled.pop(tenant, None)

    def forget(self, tenant: str) -> None:
        """The tenant is gone."""
        self._at.pop(tenant, None)
        self.stay(tenant)
