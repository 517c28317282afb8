"""What waits for a viewer: credit, the newest picture, bounded speech."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compositor.errors import Overloaded
from compositor.metrics import Metrics
from compositor.sessions.events import Event, Heard, PlaybackFinished, PlaybackStarted, Shown
from compositor.sessions.outbox import UNACKNOWLEDGED, Outbox

from .stage import drain, settle


def outbox(flow: Literal["credit", "plain"] = "credit", audio_bytes: int = 100) -> Outbox:
    return Outbox(flow, audio_bytes, Metrics())


def picture(pts: int, epoch: int = 0) -> Shown:
    return Shown(pts, epoch, 0, True, b"picture")


def speech(pts: int, size: int = 10) -> Heard:
    return Heard(pts, 0, bytes(size))


def shown(events: list[Event]) -> list[int]:
    return [event.pts for event in events if isinstance(event, Shown)]


async def test_events_come_in_their_order() -> None:
    box = outbox()
    events: list[Event] = [PlaybackStarted(0, 0), speech(0), PlaybackFinished(1, 0, 10, interrupted=False)]
    for event in (*events, picture(0)):
        box.put(event)
    assert drain(box) == [*events, picture(0)]


async def test_credit_is_two_pictures() -> None:
    box = outbox()
    seen: list[int] = []
    for pts in range(6):
        box.put(picture(pts))
        seen += shown(drain(box))
    assert seen == list(range(UNACKNOWLEDGED))
    assert box.dropped == 3
    box.acknowledge(0)
    newest = drain(box)
    assert newest == [Shown(5, 0, 0, True, b"picture", dropped=3)], "a frame of now, and how many it missed"
    box.put(picture(6))
    assert not drain(box)
    box.acknowledge(5)
    assert shown(drain(box)) == [6]


async def test_an_acknowledgement_covers_all_before_it_and_no_later_ones() -> None:
    box = outbox()
    for pts in (1, 2):
        box.put(picture(pts))
        drain(box)
    box.acknowledge(10**18)
    for pts in (3, 4, 5):
        box.put(picture(pts))
        drain(box)
    assert box.dropped == 0
    box.put(picture(6))
    assert box.dropped == 1, "5 waits for credit"


async def test_plain_flow_needs_no_acknowledgement() -> None:
    box = outbox("plain")
    for pts in range(10):
        box.put(picture(pts))
        assert shown(drain(box)) == [pts]
    assert box.dropped == 0


async def test_a_viewer_that_can_acknowledge_no_more_is_trusted() -> None:
    box = outbox()
    for pts in range(3):
        box.put(picture(pts))
        drain(box)
    taking = asyncio.create_task(box.get())
    await settle()
    assert not taking.done()
    box.lift_credit()
    event = await taking
    assert isinstance(event, Shown)
    assert event.pts == 2


async def test_speech_that_nobody_takes_is_dropped_oldest_first() -> None:
    box = outbox(audio_bytes=35)
    box.put(PlaybackStarted(0, 0))
    for pts in range(6):
        box.put(speech(pts))
    assert drain(box) == [PlaybackStarted(0, 0), speech(3), speech(4), speech(5)]
    assert box.dropped_audio == 3


@given(st.lists(st.integers(0, 60), max_size=40))
def test_speech_never_takes_more_room_than_it_may(sizes: list[int]) -> None:
    box = outbox(audio_bytes=100)
    for pts, size in enumerate(sizes):
        box.put(speech(pts, size))
    box.close()
    left = drain(box)
    assert sum(len(event.data) for event in left if isinstance(event, Heard)) <= 100
    assert left == [speech(pts, size) for pts, size in enumerate(sizes)][len(sizes) - len(left) :]
    assert box.dropped_audio == len(sizes) - len(left)


async def test_a_viewer_that_takes_nothing_at_all_is_given_up() -> None:
    box = outbox()
    for pts in range(256):
        box.put(PlaybackStarted(pts, 0))
    with pytest.raises(Overloaded, match="takes nothing"):
        box.put(PlaybackStarted(256, 0))
    assert len(drain(box)) == 256


async def test_what_is_withdrawn_is_not_delivered() -> None:
    box = outbox()
    started, finished = PlaybackStarted(0, 0), PlaybackFinished(1, 0, 10, interrupted=False)
    for event in (started, speech(0, 7), finished, speech(1, 9), speech(2, 11), picture(2)):
        box.put(event)
    assert box.withdraw() == 20, "of the segment under way alone"
    assert drain(box) == [started, finished]
    assert box.withdraw() == 0
    box.put(speech(3))
    assert drain(box) == [speech(3)]


async def test_the_rest_is_delivered_after_the_end() -> None:
    box = outbox()
    waiting = asyncio.create_task(box.get())
    await settle()
    box.put(speech(0))
    box.put(picture(0))
    box.close()
    assert await waiting == speech(0)
    assert await box.get() == picture(0)
    assert await box.get() is None
    assert await box.get() is None


async def test_nothing_follows_the_end() -> None:
    """The session paces until its viewer has seen the end: one that takes longer than a frame would never see it."""
    box = outbox("plain")
    box.put(picture(0))
    box.close()
    for event in (picture(1), speech(1), PlaybackStarted(1, 0)):
        box.put(event)
    assert drain(box) == [picture(0)]
    assert box.dropped == 0


async def test_a_viewer_without_credit_comes_to_the_end_too() -> None:
    box = outbox()
    for pts in range(4):
        box.put(picture(pts))
        drain(box)
    box.close()
    assert await box.get() is None


async def test_what_is_missed_is_counted_at_once() -> None:
    metrics = Metrics()
    box = Outbox("credit", 10, metrics)
    for pts in range(3):
        box.put(picture(pts))
        box.put(speech(pts))
    text = metrics.exposition().decode()
    assert "lipsync_pictures_dropped_total 2.0" in text
    assert "lipsync_audio_dropped_total 2.0" in text


async def test_a_picture_is_sent_when_the_next_is_asked_for_and_timed_since_it_came() -> None:
    metrics = Metrics()
    box = Outbox("plain", 100, metrics)

    def sent() -> tuple[int, float]:
        text = metrics.exposition().decode()
        count, seconds = (
            float(re.findall(rf'^lipsync_stage_seconds_{each}{{stage="send"}} (.*)$', text, re.MULTILINE)[0])
            for each in ("count", "sum")
        )
        return int(count), seconds

    box.put(picture(0))
    begin_s = time.perf_counter()
    box.put(picture(1))  # in the place of the first, which is sent to nobody
    box.put(speech(1))
    assert isinstance(await box.get(), Heard)
    assert isinstance(await box.get(), Shown)
    assert sent() == (0, 0)
    asking = asyncio.create_task(box.get())
    await settle()
    count, seconds = sent()
    assert count == 1
    assert 0 < seconds <= time.perf_counter() - begin_s
    box.close()
    assert await asking is None
    assert sent()[0] == 1
