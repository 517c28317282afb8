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

from compositor.triton.channel import Abandoned, Channel, Client

from .kserve import Kserve


@pytest.fixture
async def channel(kserve: Kserve) -> AsyncIterator[Channel]:
    channel = Channel(aio.InferenceServerClient(kserve.endpoint))
    yield channel
    await channel.close()


class Late(list[Any]):
    """What came when nobody waited for it any more: answers, and the types of errors."""

    def __call__(self, request: asyncio.Future[Any]) -> None:
        error = None if request.cancelled() else request.exception()
        self.append(asyncio.CancelledError if request.cancelled() else type(error) if error else request.result())


def inference(client: Client) -> Awaitable[Any]:
    answer: Awaitable[Any] = client.infer("m", [], client_timeout=60)
    return answer


def statistics(client: Client) -> Awaitable[Any]:
    answer: Awaitable[Any] = client.get_inference_statistics(client_timeout=60)
    return answer


async def held_back(channel: Channel, kserve: Kserve, late: Late, wait_s: float = 60) -> asyncio.Task[Any]:
    """An inference that has come to the server, which does not answer."""
    kserve.go.clear()
    asking = asyncio.create_task(channel.infer(inference, wait_s, late))
    assert await kserve.requests.get() == "infer"
    return asking


async def answered(channel: Channel, kserve: Kserve) -> None:
    """Fails where the inference that is held back was cancelled."""
    asking = asyncio.create_task(channel.ask(statistics))
    # What comes later on the same connection comes after a cancellation.
    assert await kserve.requests.get() == "statistics"
    kserve.go.set()
    await asking
    ends = [await kserve.ends.get() for _ in range(2)]
    assert ends == [("infer", "to be answered"), ("statistics", "to be answered")]
    await channel.settle()


async def test_answers_and_errors_come_to_those_who_wait(channel: Channel, kserve: Kserve) -> None:
    late = Late()
    assert (await channel.infer(inference, 60, late)).get_response().model_name == "m"
    assert (await channel.ask(statistics)).model_stats[0].name == "m"
    kserve.refusal = (grpc.StatusCode.INTERNAL, "CUDA failure 999")
    with pytest.raises(InferenceServerException, match="999"):
        await channel.infer(inference, 60, late)
    assert (channel.owed, late) == (0, [])


async def test_an_inference_goes_on_without_its_caller(channel: Channel, kserve: Kserve) -> None:
    late = Late()
    asking = await held_back(channel, kserve, late)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert (channel.owed, late) == (1, [])
    await answered(channel, kserve)
    assert (channel.owed, [answer.get_response().model_name for answer in late]) == (0, ["m"])


async def test_and_when_it_is_not_waited_for_any_longer(channel: Channel, kserve: Kserve) -> None:
    late = Late()
    with pytest.raises(asyncio.TimeoutError):
        await (await held_back(channel, kserve, late, wait_s=0.05))
    await answered(channel, kserve)
    assert len(late) == 1


async def test_and_when_the_channel_is_abandoned_which_everybody_hears_at_once(
    channel: Channel, kserve: Kserve
) -> None:
    late = Late()
    asking = [await held_back(channel, kserve, late) for _ in range(3)]
    asking.append(asyncio.create_task(channel.ask(statistics)))
    assert await kserve.requests.get() == "statistics"
    channel.abandon()
    assert {type(fault) for fault in await asyncio.gather(*asking, return_exceptions=True)} == {Abandoned}
    assert await kserve.ends.get() == ("statistics", "cancelled")
    settling = asyncio.create_task(channel.settle())
    await asyncio.wait((settling,), timeout=0.05)
    assert not settling.done()
    kserve.go.set()
    await settling
    assert (kserve.loaded["m"], len(late)) == (3, 3)


async def test_anything_else_ends_with_its_caller(channel: Channel, kserve: Kserve) -> None:
    kserve.go.clear()
    asking = asyncio.create_task(channel.ask(statistics))
    assert await kserve.requests.get() == "statistics"
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert await kserve.ends.get() == ("statistics", "cancelled")


async def test_what_is_owed_is_waited_for_no_longer_than_told_and_ends_with_the_channel(
    channel: Channel, kserve: Kserve
) -> None:
    late = Late()
    asking, gone = [await held_back(channel, kserve, late) for _ in range(2)]
    gone.cancel()
    await channel.settle(0.01)
    assert channel.owed == 2
    await channel.close()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await channel.settle()
    assert late == [asyncio.CancelledError]


async def test_errors_that_nobody_waits_for_are_no_news(channel: Channel, kserve: Kserve) -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    kserve.refusal, late = (grpc.StatusCode.INTERNAL, "CUDA failure 999"), Late()
    with pytest.raises(asyncio.TimeoutError):
        await (await held_back(channel, kserve, late, wait_s=0.01))
    kserve.go.set()
    await channel.settle()
    gc.collect()
    assert (told, late) == ([], [InferenceServerException])
