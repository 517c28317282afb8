"""The page's modules by themselves, in a real Chromium: sample rates, the wire, timing, bounds."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Page

from compositor.errors import InvalidInput
from compositor.geometry import Box
from compositor.rendering import Output, compose
from compositor.sessions.events import Audio, Failed, Heard, Shown
from compositor.tenant import Tenant
from compositor.transports.wire import Message as WireMessage
from compositor.transports.wire import Wire

from .conftest import Visit


@pytest.fixture
def page(visits: Callable[..., Visit]) -> Page:
    """A page of the service's origin with nothing but an icon on it, not even one of its own."""
    visit = visits(expected=("404",))
    visit.page.goto(f"http://{visit.address}/icon.svg")
    return visit.page


def resample(page: Page, samples: NDArray[np.float64], rate: int, chunk: int) -> NDArray[np.float64]:
    script = """async ([samples, rate, chunk]) => {
        const { Resampler } = await import("/resampler.js");
        const resampler = new Resampler(rate, 24000);
        const output = [];
        for (let begin = 0; begin < samples.length; begin += chunk) {
            output.push(...resampler.push(Float32Array.from(samples.slice(begin, begin + chunk))));
        }
        return [...output, ...resampler.finish()];
    }"""
    return np.array(page.evaluate(script, [samples.tolist(), rate, chunk]))


def tone(frequency: float, rate: int, seconds: float = 0.25) -> NDArray[np.float64]:
    wave: NDArray[np.float64] = 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)
    return wave


@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000, 44_100, 48_000, 96_000])
def test_a_tone_keeps_its_pitch_level_and_time(page: Page, rate: int) -> None:
    resampled = resample(page, tone(1000, rate), rate, 128)
    wanted = tone(1000, 24_000)
    assert abs(len(resampled) - len(wanted)) <= 1
    middle = slice(1000, 5000)  # the ends are cut off hard, and ring
    np.testing.assert_allclose(resampled[middle], wanted[middle], atol=1e-3)


@pytest.mark.parametrize("rate", [44_100, 48_000, 96_000])
def test_what_lies_above_the_new_rates_half_is_taken_out(page: Page, rate: int) -> None:
    resampled = resample(page, tone(14_000, rate), rate, 128)
    assert np.max(np.abs(resampled[1000:5000])) < 0.5e-3  # 60 dB below


def test_chunks_of_any_size_give_the_same(page: Page) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 5000)
    np.testing.assert_array_equal(resample(page, samples, 44_100, 128), resample(page, samples, 44_100, 997))


def unpack(page: Page, message: WireMessage) -> Any:
    """A message as the page reads it; bytes as lists."""
    script = """async ({ text, data }) => {
        const { unpack } = await import("/wire.js");
        const bytes = data && Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0)).buffer;
        const message = unpack(text ?? bytes);
        if (message.jpeg) message.jpeg = [...new Uint8Array(await message.jpeg.arrayBuffer())];
        if (message.samples) message.samples = [...message.samples];
        return message;
    }"""
    if isinstance(message, str):
        return page.evaluate(script, {"text": message})
    return page.evaluate(script, {"data": base64.b64encode(message).decode()})


def test_the_page_reads_what_the_service_writes(page: Page) -> None:
    wire = Wire("avatar")
    whole = {"type": "picture", "pts": 2**40, "epoch": 7, "number": 3, "dropped": 2}
    shown = Shown(2**40, 7, 3, True, b"jpeg", None, 2)
    assert unpack(page, wire.write(shown)) == {**whole, "speaking": True, "patch": None, "jpeg": [*b"jpeg"]}
    shown = Shown(2**40, 7, 3, True, b"jpeg", Box(16, 32, 48, 64), 2)
    assert unpack(page, wire.write(shown)) == {**whole, "speaking": True, "patch": [16, 32, 48, 64], "jpeg": [*b"jpeg"]}
    shown = Shown(2**40, 7, 3, False, b"", None, 2)
    assert unpack(page, wire.write(shown)) == {**whole, "speaking": False, "patch": [0, 0, 0, 0], "jpeg": None}
    heard = Heard(960, 1, np.array([0, 16384, -32768], "<i2").tobytes())
    assert unpack(page, wire.write(heard)) == {"type": "audio", "pts": 960, "epoch": 1, "samples": [0, 0.5, -1]}
    failed = unpack(page, wire.write(Failed(0, 1, InvalidInput("no such thing", field="x"))))
    assert (failed["type"], failed["error"]["message"]) == ("failed", "no such thing")


def test_the_service_reads_what_the_page_writes(page: Page) -> None:
    packed = page.evaluate(
        """async () => {
            const { packAudio } = await import("/wire.js");
            return [...new Uint8Array(packAudio(Int16Array.of(0, 1, -32768, 32767)))];
        }"""
    )
    command = Wire("avatar").read(bytes(packed))
    assert command == Audio(np.array([0, 1, -32768, 32767], "<i2").tobytes())


@pytest.mark.parametrize("fault", ["version", "kind", "length"])
def test_the_page_refuses_messages_that_are_none(page: Page, fault: str) -> None:
    message = bytearray(Wire("avatar").write(Heard(0, 0, b"\0\0")))  # type: ignore[arg-type]
    message[{"version": 0, "kind": 1, "length": 16}[fault]] = 99
    script = """async (bytes) => {
        const { unpack } = await import("/wire.js");
        try { unpack(Uint8Array.from(bytes).buffer) } catch (error) { return error.message }
    }"""
    words = {"version": "version 99", "kind": "kind 99", "length": "lost its end"}
    assert words[fault] in page.evaluate(script, [*message])


TIMELINE = """async (arrivals) => {
    const { Timeline } = await import("/timeline.js");
    const timeline = new Timeline(1000);
    return arrivals.map(([pts, now, quiet]) => {
        timeline.arrive(pts, now, quiet);
        return timeline.due(pts) - now;
    });
}"""


def ahead(page: Page, arrivals: list[tuple[int, float, bool]]) -> NDArray[np.float64]:
    """How long after each arrival its time comes, in seconds; pts are milliseconds."""
    return np.array(page.evaluate(TIMELINE, [[*arrival] for arrival in arrivals]))


def test_an_even_network_costs_little_delay(page: Page) -> None:
    waits = ahead(page, [(40 * tick, 5 + 0.04 * tick, True) for tick in range(200)])
    assert np.all((waits > 0.005) & (waits < 0.03))


def test_jitter_is_waited_for_and_forgotten(page: Page) -> None:
    rng = np.random.default_rng(0)
    late = np.concatenate((rng.uniform(0, 0.1, 300), np.zeros(300)))
    arrivals = [(40 * tick, 5 + 0.04 * tick + float(late[tick]), True) for tick in range(600)]
    waits = ahead(page, arrivals)
    assert np.mean(waits[100:300] > 0) > 0.9
    assert 0.005 < waits[-1] < 0.03


def test_the_delay_does_not_change_while_somebody_hears_it(page: Page) -> None:
    """The service's clock is 0.1 % fast: the change waits for a pause."""
    arrivals = [(40 * tick, 5 + 0.03996 * tick, tick < 10 or tick >= 2000) for tick in range(2200)]
    waits = ahead(page, arrivals)
    base = waits + [now - pts / 1000 for pts, now, _ in arrivals]
    assert np.ptp(base[10:2000]) < 1e-9
    assert waits[1999] > 0.09
    assert waits[2199] < 0.03


def test_after_a_sleep_it_begins_anew(page: Page) -> None:
    arrivals = [(40 * tick, 5 + 0.04 * tick + (3600 if tick >= 50 else 0), True) for tick in range(250)]
    waits = ahead(page, arrivals)
    assert 0 < waits[-1] < 0.05
    assert np.all(np.abs(np.diff(waits[160:])) < 0.01)


def test_a_file_is_sent_as_it_is_heard(page: Page) -> None:
    script = """async () => {
        const { Speech } = await import("/speech.js");
        const told = [];
        const speech = new Speech(
            new Int16Array(5500), 1000, (chunk) => told.push(chunk.length), () => told.push("end"));
        speech.advance(0);
        const first = told.length;
        speech.advance(500);
        const second = told.length;
        speech.advance(5000);
        return [first, second, told];
    }"""
    first, second, told = page.evaluate(script)
    assert (first, second) == (20, 25)
    assert told == [100] * 55 + ["end"]


PICTURES = """async ([count, due, jpeg]) => {
    const { Pictures } = await import("/pictures.js");
    const acknowledged = [];
    const canvas = new OffscreenCanvas(16, 16);
    const drawn = new Promise((resolve) => canvas.addEventListener("drawn", ({ detail }) => resolve(detail)));
    let dueIn = 1;
    const pictures = new Pictures(canvas, () => dueIn, (pts) => acknowledged.push(pts));
    const bytes = Uint8Array.from(atob(jpeg), (letter) => letter.charCodeAt(0));
    for (let pts = 0; pts < count; pts++) {
        const picture = { pts, epoch: 0, number: 0, speaking: false, patch: null, jpeg: new Blob([bytes]) };
        await pictures.take(picture);
    }
    const before = [pictures.waiting.length, acknowledged.length, acknowledged.at(-1)];
    if (due) dueIn = -1;
    return [before, due && await drawn, acknowledged, pictures.late];
}"""


@pytest.fixture
def jpeg(repository: Path) -> str:
    return base64.b64encode(Tenant(repository, "plain").frame(0).jpeg()).decode()


def test_pictures_that_are_not_drawn_do_not_pile_up(page: Page, jpeg: str) -> None:
    (waiting, acknowledgements, last), *_ = page.evaluate(PICTURES, [60, False, jpeg])
    assert waiting <= 16
    # No more is asked for than there is room for.
    assert (acknowledgements, last) == (8, 7)


def test_of_what_is_due_the_newest_is_drawn_and_credit_given_back(page: Page, jpeg: str) -> None:
    _, drawn, acknowledged, late = page.evaluate(PICTURES, [12, True, jpeg])
    assert drawn["pts"] == 11
    assert acknowledged[-1] == 11
    assert late == 11


def test_a_patch_on_its_prepared_frame_is_the_whole_picture(page: Page, repository: Path) -> None:
    tenant = Tenant(repository, "avatar")
    mouth = np.random.default_rng(0).integers(0, 256, (41, 41, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    pictures = {
        "whole": compose(tenant, 1, mouth, Output()).data,
        "part": compose(tenant, 1, mouth, Output(), alone=True).data,
        "prepared": tenant.frame(1).jpeg(),
    }
    script = """async ([jpegs, patch]) => {
        const { Pictures } = await import("/pictures.js");
        const blob = (name) => new Blob([Uint8Array.from(atob(jpegs[name]), (letter) => letter.charCodeAt(0))]);
        const draw = async (picture) => {
            const canvas = new OffscreenCanvas(1, 1);
            const drawn = new Promise((resolve) => canvas.addEventListener("drawn", resolve));
            const pictures = new Pictures(canvas, () => -1, () => {});
            pictures.backgrounds = { bitmap: () => createImageBitmap(blob("prepared")) };
            await pictures.take({ pts: 0, epoch: 0, number: 1, speaking: true, ...picture });
            await drawn;
            return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        };
        const whole = await draw({ patch: null, jpeg: blob("whole") });
        const patched = await draw({ patch, jpeg: blob("part") });
        const prepared = await draw({ patch: [0, 0, 0, 0], jpeg: null });
        return [difference(whole, patched), difference(whole, prepared)];
    }"""
    encoded = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    box = tenant.frame(1).patch
    same, other = page.evaluate(script, [encoded, [*box]])
    assert other["changed"] > 1000
    assert other["box"][0] >= box.x - 2
    assert other["box"][1] >= box.y - 2
    # Decoders smooth colours across the patch's edge, where there is nothing beyond it.
    assert same["changed"] <= 4 * (box.width + box.height)
