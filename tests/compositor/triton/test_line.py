"""Requests on a channel, and what becomes of them when nobody waits for their answer any more."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import grpc
import pytest
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException

from compositor.triton.line import Client, Left, Line

from .kserve import Kserve, serving


@pytest.fixture
async def kserve() -> AsyncIterator[Kserve]:
    async with serving() as kserve:
        yield kserve


@pytest.fixture
async def line(kserve: Kserve) -> AsyncIterator[Line]:
    line = Line(aio.InferenceServerClient(kserve.endpoint))
    yield line
    await line.close(0)


def inference(client: Client) -> Awaitable[Any]:
    answer: Awaitable[Any] = client.infer("m", [], client_timeout=60)
    return answer


def statistics(client: Client) -> Awaitable[Any]:
    answer: Awaitable[Any] = client.get_inference_statistics(client_timeout=60)
    return answer


async def held_back(line: Line, kserve: Kserve, wait_s: float = 60) -> asyncio.Task[Any]:
    """An inference that has come to the server, which does not answer."""
    kserve.go.clear()
    asking = asyncio.create_task(line.infer(inference, wait_s))
    assert await kserve.requests.get() == "infer"
    return asking


async def answered(kserve: Kserve) -> None:
    """Fails where the inference that is held back was cancelled."""
    kserve.go.set()
    assert await kserve.ends.get() == ("infer", "to be answered")


async def test_answers_and_errors_come_to_those_who_wait(line: Line, kserve: Kserve) -> None:
    assert (await line.infer(inference, 60)).get_response().model_name == "m"
    assert (await line.ask(statistics)).model_stats[0].name == "m"
    kserve.refusal = (grpc.StatusCode.INTERNAL, "CUDA failure 999")
    with pytest.raises(InferenceServerException, match="999"):
        await line.infer(inference, 60)


async def test_an_inference_goes_on_without_its_caller(line: Line, kserve: Kserve) -> None:
    asking = await held_back(line, kserve)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await answered(kserve)


async def test_and_when_it_is_not_waited_for_any_longer(line: Line, kserve: Kserve) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await (await held_back(line, kserve, wait_s=0.05))
    await answered(kserve)


async def test_and_when_the_line_is_left_which_everybody_hears_at_once(line: Line, kserve: Kserve) -> None:
    asking = [await held_back(line, kserve) for _ in range(3)]
    asking.append(asyncio.create_task(line.ask(statistics)))
    assert await kserve.requests.get() == "statistics"
    line.leave()
    assert {type(fault) for fault in await asyncio.gather(*asking, return_exceptions=True)} == {Left}
    assert await kserve.ends.get() == ("statistics", "cancelled")
    closing = asyncio.create_task(line.close())
    await asyncio.wait((closing,), timeout=0.05)
    assert not closing.done()
    kserve.go.set()
    await closing
    assert kserve.loaded["m"] == 3


async def test_anything_else_ends_with_its_caller(line: Line, kserve: Kserve) -> None:
    kserve.go.clear()
    asking = asyncio.create_task(line.ask(statistics))
    assert await kserve.requests.get() == "statistics"
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert await kserve.ends.get() == ("statistics", "cancelled")


async def test_a_line_that_is_closed_waits_no_longer_than_it_may(line: Line, kserve: Kserve) -> None:
    asking = await held_back(line, kserve)
    await line.close(0.01)
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_errors_that_nobody_waits_for_are_no_news(line: Line, kserve: Kserve) -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    kserve.refusal = (grpc.StatusCode.INTERNAL, "CUDA failure 999")
    with pytest.raises(asyncio.TimeoutError):
        await (await held_back(line, kserve, wait_s=0.01))
    kserve.go.set()
    await line.close()
    gc.collect()
    assert not told
