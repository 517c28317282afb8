"""One gRPC channel to Triton, on which no inference is cancelled: in goes a request, and out comes its answer, for as
long as somebody waits for it.

Triton may crash where an inference is cancelled, or its gRPC deadline passes, just when its answer is ready: SIGSEGV on
2.51, in 5 of 25,600 inferences that were cancelled at random; triton-inference-server/server, issues 7368 and 8034. So
an inference whose caller has gone is left to be answered, and its channel is closed only then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

from tritonclient.grpc import aio

Client: TypeAlias = aio.InferenceServerClient
Answer = TypeVar("Answer")


class Left(Exception):
    """The channel was left before the answer came."""


class Line:
    """A channel, and the inferences that Triton owes an answer."""

    def __init__(self, client: Client) -> None:
        """Takes the client over. Needs a running event loop."""
        self._client = client
        self._owed: set[asyncio.Future[Any]] = set()
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def ask(self, request: Callable[[Client], Awaitable[Answer]]) -> Answer:
        """What is answered; the request is cancelled with its caller. Raises what `request` raises, and Left."""
        task = asyncio.ensure_future(request(self._client))
        try:
            return await self._answer(task, None)
        finally:
            task.cancel()

    async def infer(self, request: Callable[[Client], Awaitable[Answer]], wait_s: float) -> Answer:
        """What is answered within `wait_s`; the request goes on without its caller, and should therefore have a
        deadline much later. Raises what `request` raises, asyncio.TimeoutError, and Left."""
        task = asyncio.ensure_future(request(self._client))
        self._owed.add(task)
        task.add_done_callback(self._owed.discard)
        return await self._answer(task, wait_s)

    async def _answer(self, task: asyncio.Future[Answer], wait_s: float | None) -> Answer:
        # Somebody has to look at the error of a request that nobody waits for any more.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.wait((task, self._end), timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if self._end.done():
            raise Left
        raise asyncio.TimeoutError

    def leave(self) -> None:
        """Everybody who waits for an answer gets Left, at once."""
        if not self._end.done():
            self._end.set_result(None)

    async def close(self, wait_s: float | None = None) -> None:
        """Closes the channel once Triton owes nothing, at the latest after `wait_s`; then what is under way is
        cancelled."""
        if self._owed:
            await asyncio.wait(self._owed, timeout=wait_s)
        await self._client.close()
