"""Second opinions: a request that failed at one server, as it would at a broken one, is made again at another. What
comes of it is the answer, and says who was at fault: `breaker` takes it from there.

A request whose deadline passed cannot be made again; where the server had answered nobody for long, the tenant's next
one goes elsewhere first. Where another server has no answer either, the caller is told the first one's error.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ..errors import DeadlinePassed, LipsyncError
from .connection import blames_server
from .endpoint import Endpoint
from .placement import Placement, models_of

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
BROKEN_S = 60.0
"""A model that failed at two servers is tried at one only for so long."""


class Opinions:
    """Of the servers of a fleet on each other."""

    def __init__(
        self,
        placement: Placement,
        leave: Callable[[Endpoint, str], None],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """leave: is told of copies that were loaded to see whether they work, and did not. now_s: seconds that only
        grow."""
        self._placement, self._leave, self._now_s = placement, leave, now_s
        self._broken: dict[str, tuple[float, tuple[Endpoint, Endpoint]]] = {}
        """Until when models that failed at two servers are tried at one only, and these."""
        self.unanswered: dict[str, Endpoint] = {}
        """Tenants whose last request got no answer, at a server that answered nobody."""

    def doubts(self, fault: LipsyncError, endpoint: Endpoint, model: str) -> bool:
        """Whether it may be the fault of the server that a request failed there."""
        if not blames_server(fault):
            return False
        is_broken = self._is_broken(model)
        if not is_broken or not endpoint.breaker.proved():
            endpoint.breaker.failed(model)
        return not is_broken

    async def second(
        self,
        fault: LipsyncError,
        endpoint: Endpoint,
        tenant: str,
        model: str,
        ask: Callable[[Endpoint], Awaitable[Answer]],
    ) -> Answer:
        """Another server's answer to a request that failed at `endpoint`. Raises the fault where there is none."""
        witness = self._placement.witness(tenant, model, endpoint)
        if witness is None:
            raise fault
        try:
            return await self._ask(witness, endpoint, tenant, model, ask)
        except LipsyncError as error:
            log.info("%s is no better off on %s: %s", model, witness.name, error.message)
        raise fault

    def gave_up(self, endpoint: Endpoint, tenant: str, model: str) -> None:
        """The deadline of a request passed, or its caller went away, or it was not even sent as others wait."""
        if endpoint.is_silent() and not self._is_broken(model):
            endpoint.breaker.failed(model)
            self.unanswered[tenant] = endpoint

    async def first(
        self, tenant: str, model: str, ask: Callable[[Endpoint], Awaitable[Answer]]
    ) -> tuple[Answer] | None:
        """Another server's answer to the request after one that was not answered; None where there is none, and the
        request is to be made as any other."""
        endpoint = self.unanswered.pop(tenant)
        witness = self._placement.witness(tenant, model, endpoint)
        if witness is None or self._placement.at(tenant) is not endpoint or not endpoint.is_silent():
            return None
        try:
            return (await self._ask(witness, endpoint, tenant, model, ask),)
        except LipsyncError as error:
            log.info("%s is no better off on %s: %s", model, witness.name, error.message)
            return None

    def forget(self, tenant: str) -> None:
        """The tenant's files may be others now, or gone."""
        self.unanswered.pop(tenant, None)
        for model in models_of(tenant):
            self._broken.pop(model, None)

    def _is_broken(self, model: str) -> bool:
        """A server that was found to be broken since has convicted nobody."""
        until_s, servers = self._broken.get(model, (0.0, ()))
        return until_s > self._now_s() and all(server.breaker.closed for server in servers)

    async def _ask(
        self,
        witness: Endpoint,
        endpoint: Endpoint,
        tenant: str,
        model: str,
        ask: Callable[[Endpoint], Awaitable[Answer]],
    ) -> Answer:
        """The witness's answer, and the tenant moves there."""
        is_new, inferences = model not in witness.residency, witness.triton.inferences
        try:
            answer = await ask(witness)
        except BaseException as error:
            if _speaks_against(error, witness):
                self._failed_twice(model, endpoint, witness)
            if is_new:
                self._leave(witness, model)
            raise
        # The request of a session that only loads its tenant asks for no inference.
        if witness.triton.inferences != inferences:
            endpoint.breaker.contradicted(model)
        if self._placement.at(tenant) is endpoint:
            log.warning("%s failed on %s and works on %s: it goes on there", model, endpoint.name, witness.name)
            self._placement.settle(tenant, witness)
        return answer

    def _failed_twice(self, model: str, endpoint: Endpoint, witness: Endpoint) -> None:
        """Only a witness where something works can tell that the model is to blame: both servers may be broken."""
        if witness.breaker.proved():
            now_s = self._now_s()
            self._broken = {each: verdict for each, verdict in self._broken.items() if verdict[0] > now_s}
            self._broken[model] = now_s + BROKEN_S, (endpoint, witness)
            endpoint.breaker.forget(model)
        else:
            witness.breaker.failed(model)


def _speaks_against(error: BaseException, witness: Endpoint) -> bool:
    """Whether the witness failed as a broken server would, or is silent."""
    if isinstance(error, DeadlinePassed):
        return witness.is_silent()
    return isinstance(error, LipsyncError) and blames_server(error)
