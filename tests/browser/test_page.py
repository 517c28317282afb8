"""The page in a real Chromium, against the whole system: what is seen and heard of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import WebSocketRoute

from compositor.geometry import Box
from compositor.settings import Settings
from compositor.tenant import Tenant
from compositor.transports.wire import Kind
from tests.conftest import ServiceThread, Stack
from tests.integration.waiting import until

from .conftest import SPEECH, Message, Visit, wav

RATE = 24_000
Tone = Callable[[float, int], Any]

DROP = """([data, name]) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([bytes], name));
    document.body.dispatchEvent(new DragEvent("dragover", { bubbles: true, cancelable: true, dataTransfer }));
    document.body.dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer }));
}"""


def say(visit: Visit, name: str = "hello") -> None:
    visit.page.click(f"[data-speech='speech/{name}.wav']")


def finished(visit: Visit) -> list[dict[str, Any]]:
    """What the service said of each speech that it showed."""
    return [json.loads(text) for text in visit.received if isinstance(text, str) and "playback_finished" in text]


def heard(visit: Visit) -> list[Message]:
    """The pieces of speech that came from the service."""
    return [message for message in visit.received if isinstance(message, Message) and message.kind is Kind.AUDIO]


def inside(box: list[int], patches: list[Box]) -> bool:
    """Whether a box of differing pixels lies within one of the mouth's patches, but for what decoding smooths."""
    left, top, right, bottom = box
    return any(
        left >= patch.x - 2
        and top >= patch.y - 2
        and right <= patch.x + patch.width + 2
        and bottom <= patch.y + patch.height + 2
        for patch in patches
    )


@pytest.fixture
def patches(repository: Path) -> list[Box]:
    """Where the avatar's pictures may differ from its prepared frames."""
    tenant = Tenant(repository, "avatar")
    return [tenant.frame(number).patch for number in range(tenant.frames)]


def test_idle_pictures_move_on_and_the_mouth_rests(visit: Visit) -> None:
    visit.wait_for_pictures(20)
    pictures = visit.pictures
    assert [picture["changed"] for picture in pictures] == [0] * len(pictures)
    assert not any(picture["speaking"] for picture in pictures)
    assert len({picture["number"] for picture in pictures}) > 1
    assert all(one["pts"] < next_one["pts"] for one, next_one in pairwise(pictures))
    assert visit.state == "Ready"
    assert visit.notice == ""
    visit.wait_for("() => Number(document.getElementById('fps').textContent) > 0")
    visit.wait_for("() => document.getElementById('data').textContent.includes('B')")


def test_the_mouth_moves_with_a_sentence_and_rests_after_it(visit: Visit, patches: list[Box]) -> None:
    say(visit)
    visit.wait_for_passing("speaking")
    visit.wait_for_speech(10)
    visit.wait_for_state("idle")
    visit.wait_for("() => recorded.pictures.at(-1).changed === 0")
    moving = [picture for picture in visit.pictures if picture["changed"]]
    assert all(picture["speaking"] and inside(picture["box"], patches) for picture in moving)
    assert len({picture["changed"] for picture in moving}) > 3  # it opens and closes
    assert visit.page.inner_text("#delay").endswith(" ms")


def test_a_dropped_file_is_said_and_its_pauses_are_silent(visit: Visit, tone: Tone) -> None:
    pause = np.zeros(int(1.2 * 44_100), np.float32)
    speech = np.concatenate((tone(0.6, 44_100), pause, tone(0.6, 44_100)))
    file = [base64.b64encode(wav(speech, 44_100)).decode(), "two words.wav"]

    def both_move() -> bool:
        """Says the file; whether the mouth was seen to move with both words, and between."""
        before = len(finished(visit)), len(heard(visit))
        visit.page.evaluate(DROP, file)
        while len(finished(visit)) == before[0]:
            visit.wait_for_pictures(1)
        visit.wait_for_pictures(20)
        pieces = heard(visit)[before[1] :]
        first, pause, second = (moves(visit, pieces, *span) for span in ((0, 0.6), (0.9, 1.6), (1.8, 2.4)))
        # The mouth moves on for 160 ms, and takes 120 ms to come to rest.
        assert not any(pause)
        assert visit.page.is_hidden("#drop-hint")
        return any(first) and bool(pause) and any(second)

    until(both_move, 240)  # at once, unless the machine stands still


def moves(visit: Visit, pieces: list[Message], begin_s: float, end_s: float) -> list[bool]:
    """Whether the mouth moves in each picture that goes with a part of a speech, which came in these pieces."""
    sizes = [len(piece.payload) // 2 for piece in pieces]
    said = [sum(sizes[:number]) for number in range(len(pieces))]
    span = {piece.pts for piece, at in zip(pieces, said, strict=True) if begin_s <= at / RATE < end_s}
    return [picture["changed"] > 0 for picture in visit.pictures if picture["pts"] in span]


def test_sound_and_picture_go_together(visit: Visit) -> None:
    def together() -> bool:
        """Says a sentence; whether most pictures are seen when their sound is heard, and most of that has no gap."""
        before = len(finished(visit)), len(visit.sounds)
        say(visit)
        while len(finished(visit)) == before[0]:
            visit.wait_for_pictures(1)
        pieces, sounds = heard(visit)[before[1] :], visit.sounds[before[1] :]
        due = {piece.pts: sound["when"] + sound["latency"] for piece, sound in zip(pieces, sounds, strict=False)}
        skews = [picture["at"] - due[picture["pts"]] for picture in visit.pictures if picture["pts"] in due]
        # One piece follows the other without a gap, unless the machine itself could not keep up, and never cuts into
        # it.
        gaps = [two["when"] - one["when"] - one["samples"] / RATE for one, two in pairwise(sounds)]
        assert all(gap > -1e-6 for sound, gap in zip(sounds, gaps, strict=False) if sound["loud"])
        return len(skews) > 20 and abs(median(skews)) < 0.06 and abs(median(gaps)) < 1e-6

    until(together, 240)  # at once, unless the machine is busy


@pytest.mark.parametrize("way", ["button", "key"])
def test_stop_stops(visit: Visit, way: str) -> None:
    stop = (
        "document.getElementById('stop').click()"
        if way == "button"
        else ("document.body.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape', bubbles: true }))")
    )
    # In one task: nothing is drawn in between.
    visit.at_speech(f"({stop}, [recorded.pictures.length, recorded.sounds.length, soundContext.currentTime])")
    say(visit)
    drawn, played, now = visit.acted()
    visit.wait_for_state("idle")
    visit.wait_for("() => recorded.pictures.at(-1).epoch > 0 && recorded.pictures.at(-1).changed === 0")
    visit.wait_for_pictures(10)
    pictures = visit.pictures
    assert {picture["epoch"] for picture in pictures[:drawn]} == {0}
    assert not any(picture["speaking"] and picture["epoch"] == 0 for picture in pictures[drawn:])
    assert pictures[-1]["epoch"] == 1
    sounds = visit.sounds
    assert len(sounds) == played
    assert all(sound["cut"] for sound in sounds if sound["when"] + sound["samples"] / RATE > now + 0.01)
    (end,) = finished(visit)
    assert end["interrupted"]
    assert 0 < end["position"] < 6 * RATE


def test_stop_at_rest_does_no_harm(visit: Visit) -> None:
    visit.page.click("#stop")
    visit.wait_for("() => recorded.pictures.at(-1)?.epoch === 1")
    say(visit)
    visit.wait_for_speech()
    assert visit.sounds


def test_a_sentence_replaces_the_one_that_is_being_said(visit: Visit) -> None:
    visit.at_speech("document.querySelector(\"[data-speech='speech/numbers.wav']\").click()")
    say(visit)
    visit.wait_for("() => recorded.pictures.some(({ epoch, changed }) => epoch === 1 && changed > 0)")
    visit.page.keyboard.press("Escape")
    visit.wait_for_state("idle")


def test_the_microphone_is_heard_while_space_is_held(visit: Visit) -> None:
    visit.page.keyboard.down(" ")
    visit.wait_for_passing("listening")
    assert visit.page.get_attribute("#talk", "aria-pressed") == "true"
    assert visit.page.inner_text("#talk") == "Let go to end"
    visit.wait_for_speech(15)
    visit.page.keyboard.up(" ")
    visit.wait_for_state("idle")
    chunks = [message.payload for message in visit.sent if isinstance(message, Message)]
    samples = np.frombuffer(b"".join(chunks), "<i2") / 32768
    assert np.max(np.abs(samples)) > 0.1
    assert [text for text in visit.sent if isinstance(text, str) and "segment_end" in text]
    # It lets go of the microphone: whatever was still sent came before the end of the segment.
    assert isinstance(next(message for message in reversed(visit.sent) if "ack" not in str(message)), str)


def test_the_button_is_held_while_talking(visit: Visit) -> None:
    visit.page.hover("#talk")
    visit.page.mouse.down()
    visit.wait_for_passing("listening")
    visit.wait_for_speech()
    visit.page.mouse.up()
    visit.wait_for_state("idle")


def test_talking_interrupts(visit: Visit) -> None:
    visit.at_speech("document.body.dispatchEvent(new KeyboardEvent('keydown', { key: ' ', bubbles: true }))")
    say(visit)
    # More of them than fade after the interruption: the new speech.
    moving = "() => recorded.pictures.filter(({ epoch, changed }) => epoch === 1 && changed > 0).length > 15"
    visit.wait_for(moving)
    visit.page.keyboard.up(" ")
    visit.wait_for_state("idle")


def test_a_tap_on_the_button_begins_and_another_ends(visit: Visit) -> None:
    visit.page.dispatch_event("#talk", "click")  # as assistive technology does
    visit.wait_for_passing("listening")
    assert visit.page.inner_text("#talk") == "Press to end"
    visit.wait_for_speech()
    visit.page.click("#talk")
    visit.wait_for_state("idle")
    assert visit.page.get_attribute("#talk", "aria-pressed") == "false"


def test_stop_ends_talking_too(visit: Visit) -> None:
    visit.page.keyboard.down(" ")
    visit.wait_for_speech()
    visit.page.keyboard.press("Escape")
    visit.wait_for_state("idle")
    sent = visit.sent[-1]
    visit.wait_for_pictures(10)
    chunks = [message for message in visit.sent[visit.sent.index(sent) :] if isinstance(message, Message)]
    assert chunks == []


def test_another_tenant_takes_over(visit: Visit) -> None:
    say(visit)
    visit.wait_for_speech()
    visit.page.select_option("#tenant", "plain")
    visit.wait_for("() => document.querySelector('canvas').width === 320")
    visit.wait_for_state("idle")
    visit.compare_with("plain")
    visit.wait_for_pictures(10)
    assert {picture["epoch"] for picture in visit.pictures} == {1}
    assert {picture["changed"] for picture in visit.pictures} == {0}
    assert visit.page.url.endswith("#plain")
    assert sum("started" in str(message)[:20] for message in visit.received) == 2


def test_patches_make_the_same_pictures_of_less_data(visit: Visit, patches: list[Box]) -> None:
    visit.wait_for_pictures(20)
    whole = [len(message.payload) for message in visit.received if isinstance(message, Message)]
    visit.page.check("#patches")
    visit.wait_for("() => document.getElementById('patches-hint').textContent.startsWith('Fetched 6 of 6')")
    visit.wait_for_state("idle")
    visit.compare_with("avatar")
    say(visit)
    visit.wait_for_speech(10)
    visit.wait_for_state("idle")
    visit.wait_for("() => recorded.pictures.at(-1).changed === 0")
    pictures = visit.pictures
    assert all(inside(picture["box"], patches) for picture in pictures if picture["changed"])
    assert {picture["changed"] for picture in pictures if not picture["speaking"]} == {0}
    started = [number for number, message in enumerate(visit.received) if "started" in str(message)[:20]]
    later = visit.received[started[1] :]  # in the session with patches
    seen = [message for message in later if isinstance(message, Message) and message.kind != Kind.AUDIO]
    assert {message.kind for message in seen} == {Kind.PATCH}
    assert median(len(message.payload) for message in seen) < median(whole) / 2
    visit.page.uncheck("#patches")
    while isinstance(last := visit.received[-1], str) or last.kind is not Kind.FRAME:
        visit.wait_for_pictures(1)


def test_patches_of_another_tenant_are_fetched_before_it_is_shown(visit: Visit) -> None:
    visit.page.check("#patches")
    visit.wait_for("() => document.getElementById('patches-hint').textContent.startsWith('Fetched 6 of 6')")
    visit.page.select_option("#tenant", "plain")
    visit.wait_for("() => document.querySelector('canvas').width === 320")
    visit.compare_with("plain")
    visit.wait_for_pictures(10)
    assert {picture["changed"] for picture in visit.pictures} == {0}


def test_without_a_secure_context_all_works_but_the_microphone(visits: Callable[..., Visit], stack: Stack) -> None:
    visit = visits(f"elsewhere.test:{stack.service.http_port}", expected=("Cross-Origin-Opener-Policy",))
    visit.open()
    assert "HTTPS" in visit.page.inner_text("#talk-hint")
    assert visit.page.is_disabled("#talk")
    visit.page.keyboard.press(" ")
    say(visit)
    visit.wait_for_speech()
    assert visit.sounds
    assert visit.notice == ""


def test_a_refused_microphone_is_told(visit: Visit) -> None:
    visit.page.evaluate(
        """() => {
            navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException("no", "NotAllowedError"));
        }"""
    )
    visit.page.click("#talk")
    visit.page.wait_for_selector("#notice:visible")
    assert visit.notice.startswith("The microphone was refused.")
    assert visit.page.get_attribute("#talk", "aria-pressed") == "false"
    assert visit.state == "Ready"
    visit.page.click("#dismiss")
    assert visit.notice == ""


def test_a_file_that_is_no_sound_is_told(visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("not a sound")
    visit.page.set_input_files("#file", tmp_path / "text.wav")
    visit.page.wait_for_selector("#notice:visible")
    assert "holds no sound" in visit.notice
    assert visit.state == "Ready"


def test_a_chosen_file_is_said(visit: Visit) -> None:
    visit.page.set_input_files("#file", SPEECH / "numbers.wav")
    visit.wait_for_speech()


def test_a_service_that_goes_and_comes_back(visits: Callable[..., Visit], stack: Stack) -> None:
    service = ServiceThread(stack.service.settings)
    service.start()
    visit = visits(service.http_address, expected=("ERR_CONNECTION_", "ERR_EMPTY_RESPONSE"))
    try:
        visit.open()
    finally:
        service.stop()
    visit.wait_for_state("lost")
    assert visit.page.is_disabled("#talk")
    assert visit.page.is_disabled("#stop")
    visit.wait_for("() => document.getElementById('notice-text').textContent.includes('cannot be reached')")
    assert visit.notice == "The service cannot be reached. Trying again."
    values = stack.service.settings.model_dump()
    values["http"]["port"] = service.http_port
    again = ServiceThread(Settings.model_validate(values))
    again.start()
    try:
        visit.wait_for_state("idle")
        assert visit.notice == ""
        visit.wait_for_pictures(10)
        say(visit)
        visit.wait_for_speech()
        visit.page.goto("about:blank")
    finally:
        again.stop()


def test_a_tenant_that_is_gone_is_told_in_the_services_words(visits: Callable[..., Visit]) -> None:
    visit = visits()
    visit.page.route(
        "**/v1/tenants", lambda route: route.fulfill(json={"tenants": [{"id": "ghost"}, {"id": "avatar"}]})
    )
    visit.page.goto(f"http://{visit.address}/")
    visit.page.wait_for_selector("#retry:visible")
    assert visit.notice == "No tenant named 'ghost' is installed."
    visit.page.select_option("#tenant", "avatar")
    visit.wait_for_state("idle")
    assert visit.notice == ""


def test_a_service_that_is_full_is_asked_again(visits: Callable[..., Visit]) -> None:
    visit = visits()
    error = {"message": "128 sessions are live already", "retry_after_s": 0.2}
    seen = False

    def refuse(socket: WebSocketRoute) -> None:
        if not seen:
            socket.on_message(lambda message: None)
            socket.send(json.dumps({"type": "error", "error": error}))
            socket.close(code=4429, reason="OVERLOADED")
        else:
            socket.connect_to_server()

    visit.page.route_web_socket("**/ws/*", refuse)
    visit.page.goto(f"http://{visit.address}/")
    visit.wait_for("() => document.getElementById('notice-text').textContent !== ''")
    assert visit.page.text_content("#notice-text") == "128 sessions are live already. Trying again."
    seen = True
    visit.wait_for_state("idle")
    assert visit.notice == ""


def test_a_service_of_another_version_is_told(visits: Callable[..., Visit]) -> None:
    visit = visits()

    def speak_otherwise(socket: WebSocketRoute) -> None:
        socket.on_message(lambda message: socket.send(b"\x02" + bytes(30)))

    visit.page.route_web_socket("**/ws/*", speak_otherwise)
    visit.page.goto(f"http://{visit.address}/")
    visit.page.wait_for_selector("#retry:visible")
    assert visit.notice == "The service sends version 2 of binary messages, not 1."


def test_an_empty_repository_is_told(visits: Callable[..., Visit]) -> None:
    visit = visits()
    visit.page.route("**/v1/tenants", lambda route: route.fulfill(json={"tenants": []}))
    visit.page.goto(f"http://{visit.address}/")
    visit.page.wait_for_selector("#retry:visible")
    assert "lipsync tenant add" in visit.notice
    visit.page.unroute("**/v1/tenants")
    visit.page.click("#retry")
    visit.wait_for_state("idle")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844), (320, 568)])
def test_nothing_is_cut_off(visits: Callable[..., Visit], width: int, height: int) -> None:
    visit = visits(viewport={"width": width, "height": height})
    visit.open()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    for control in ("#talk", "#stop", "canvas"):
        box = visit.page.locator(control).bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["y"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["y"] + box["height"] <= height


def test_everything_is_reached_by_keyboard_and_has_a_name(visit: Visit) -> None:
    reached = []
    for _ in range(9):
        visit.page.keyboard.press("Tab")
        reached.append(
            visit.page.evaluate(
                """() => {
                    const control = document.activeElement;
                    const shown = control.closest("label")?.querySelector("span") ?? control;
                    const style = getComputedStyle(control.id === "file" ? shown : control);
                    return [control.id || control.dataset.speech, style.outlineStyle, shown.innerText.trim() !== ""];
                }"""
            )
        )
    names = [name for name, *_ in reached if name]
    assert names[:6] == ["tenant", "talk", "stop", "speech/hello.wav", "speech/numbers.wav", "file"]
    assert "patches" in names
    assert all(outline == "solid" and named for name, outline, named in reached if name)
