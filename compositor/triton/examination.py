"""Examines servers whose inference is in doubt: some of their models are asked for one inference each, of zeros. What
comes of it `breaker` judges; requests that wait for a server whose inference hangs are made to go elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from ..deadline import Deadline
from ..errors import DeadlinePassed, LipsyncError
from ..residency.models import Facts, ModelReport, State
from .breaker import Outcome
from .connection import blames_server
from .endpoint import Endpoint

log = logging.getLogger(__name__)

PERIOD_S = 0.5
"""Between looks whether there is anything to examine."""
MOST_MODELS = 3
"""Models of a server that are asked at once."""
_MOST_SUSPECTS = 2
"""Of these, so many that failed before: another one may tell that only they do."""
_GRACE_S = 0.25


class Examiner:
    """Of the servers of a fleet."""

    def __init__(self, endpoints: Sequence[Endpoint], load_timeout_s: float, facts: Callable[[str], Facts]) -> None:
        """facts: what the files say of a model."""
        self._endpoints = endpoints
        self._load_timeout_s = load_timeout_s
        self._facts = facts
        self._tasks: dict[Endpoint, asyncio.Task[None]] = {}

    async def watch(self) -> None:
        """Runs until it is cancelled."""
        try:
            while True:
                await asyncio.sleep(PERIOD_S)
                self.step()
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def step(self) -> None:
        """Begins what examinations are due, and waits for none."""
        for endpoint in self._endpoints:
            endpoint.breaker.look()
            if endpoint.up and endpoint not in self._tasks and endpoint.breaker.is_due(endpoint.is_silent()):
                self._tasks[endpoint] = asyncio.create_task(self._guarded(endpoint))

    async def _guarded(self, endpoint: Endpoint) -> None:
        try:
            await self.examine(endpoint)
        except Exception:
            log.exception("the examination of Triton at %s itself failed", endpoint.name)
        finally:
            del self._tasks[endpoint]

    async def examine(self, endpoint: Endpoint) -> None:
        """Asks some models of a server, and acts upon what comes of it."""
        endpoint.breaker.begin()
        models = self._choose(endpoint)
        outcomes = await asyncio.gather(*(self._try(endpoint, model) for model in models))
        hangs = endpoint.breaker.end(dict(zip(models, outcomes, strict=True)))
        if hangs and any(other.works for other in self._endpoints):
            endpoint.let_go()

    def _choose(self, endpoint: Endpoint) -> list[str]:
        """The models to ask: where the circuit is closed and some fail, others than those."""
        breaker = endpoint.breaker
        for model in [model for model in breaker.suspects if self._facts(model).stamp is None]:
            breaker.forget(model)
        reports = [model for model in endpoint.residency.report() if model.state is State.READY]
        loaded = [model.name for model in sorted(reports, key=self._order)]
        again = not breaker.closed or endpoint.is_silent()
        suspects = [model for model in breaker.suspects if again and model in loaded]
        others = [model for model in loaded if model not in breaker.suspects]
        chosen = [*suspects[: max(_MOST_SUSPECTS, MOST_MODELS - len(others))], *others][:MOST_MODELS]
        if not chosen and not breaker.closed:
            # Those that work elsewhere are loaded for it.
            return [model for model in breaker.suspects if breaker.known_to_work(model)][:MOST_MODELS]
        return chosen

    def _order(self, model: ModelReport) -> tuple[bool, float]:
        """Audio encoders first, and of the others those first that are in use now: for Triton an examination is a use,
        which keeps a model loaded."""
        return self._facts(model.name).evictable, -model.last_use_s

    async def _try(self, endpoint: Endpoint, model: str) -> Outcome:
        inferred = endpoint.triton.inferred
        try:
            if model not in endpoint.residency:
                await endpoint.residency.ensure(model, Deadline.after(self._load_timeout_s))
            await _within(endpoint.patience_s(), endpoint.triton.warm(model))
        except DeadlinePassed:
            return Outcome.SILENT if endpoint.triton.inferred == inferred else Outcome.UNKNOWN
        except LipsyncError as error:
            log.info("%s fails on %s: %s", model, endpoint.name, error.message)
            return Outcome.FAILED if blames_server(error) else Outcome.UNKNOWN
        return Outcome.WORKED


async def _within(seconds: float, work: Awaitable[None]) -> None:
    """Raises DeadlinePassed where the work is not done by then, and ends it."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,), timeout=seconds)
        # What came while this process itself was held up is taken in first.
        await asyncio.wait((task,), timeout=_GRACE_S)
        if not task.done():
            raise DeadlinePassed("no answer came in time")
        task.result()
    finally:
        task.cancel()
