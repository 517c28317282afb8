"""What tests in a real Chromium share: the browser, and a page of it that is watched and writes down what it shows."""

from __future__ import annotations

import io
import os
import shutil
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Browser, ConsoleMessage, Page, WebSocket, sync_playwright

from compositor.transports.wire import HEADER, Kind
from tests.conftest import Stack

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
RECORDER = Path(__file__).with_name("recorder.js")
SPEECH = Path(__file__).parents[2] / "compositor" / "web" / "speech"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    f"--use-file-for-fake-audio-capture={SPEECH / 'numbers.wav'}",
    # A name that is not this machine's own: what comes from there is not secure without TLS.
    "--host-resolver-rules=MAP elsewhere.test 127.0.0.1",
]
PATIENCE_MS = 60_000
AT_SPEECH = """() => {
    const canvas = document.querySelector("canvas");
    const look = () => {
        if (recorded.pictures.filter(({ changed }) => changed > 0).length < 5) return;
        canvas.removeEventListener("drawn", look);
        window.acted = ACT ?? null;
    };
    canvas.addEventListener("drawn", look);
}"""


def without_browser(reason: str) -> None:
    """Skips, but never where a skip would go unseen."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    """A headless Chromium of the system's. It ends with this package: while it runs, no test can have an event loop."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        without_browser("no Chromium: install it (Debian: apt-get install chromium), or name it in CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS, timeout=PATIENCE_MS)
        yield browser
        browser.close()


@dataclass
class Message:
    """A binary message of the socket."""

    kind: Kind
    epoch: int
    pts: int
    payload: bytes


@dataclass
class Visit:
    """A visit to the page. Whatever it complains of, and every host that it asks, is written down."""

    page: Page
    address: str
    complaints: list[str] = field(default_factory=list, repr=False)
    hosts: set[str] = field(default_factory=set, repr=False)
    sent: list[str | Message] = field(default_factory=list, repr=False)
    received: list[str | Message] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.add_init_script(path=RECORDER)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        self.page.on("websocket", self._socket)

    def open(self, tenant: str = "avatar") -> None:
        """Opens the page, and returns when it is ready."""
        self.page.goto(f"http://{self.address}/#{tenant}")
        self.wait_for_state("idle")
        self.compare_with(tenant)

    def compare_with(self, tenant: str) -> None:
        """Pictures from now on are compared with this tenant's prepared frames."""
        self.page.evaluate("compareWith", tenant)
        self.page.evaluate("() => { recorded.pictures.length = 0 }")

    def wait_for_state(self, state: str) -> None:
        self.page.wait_for_selector(f"body[data-state={state}]")

    def wait_for_passing(self, state: str) -> None:
        """Waits until the page is in that state or was in it before."""
        self.wait_for("state => recorded.states.includes(state)", state)

    def wait_for(self, condition: str, argument: Any = None) -> None:
        """Waits until a JavaScript function of `argument` says yes. `recorded` is what was written down."""
        self.page.wait_for_function(condition, arg=argument)

    def wait_for_pictures(self, count: int) -> None:
        """Waits for so many more pictures."""
        before = len(self.pictures)
        self.wait_for("count => recorded.pictures.length >= count", before + count)

    def wait_for_speech(self, count: int = 5) -> None:
        """Waits until so many pictures in all had a moving mouth."""
        self.wait_for("count => recorded.pictures.filter(({ changed }) => changed > 0).length >= count", count)

    def at_speech(self, act: str) -> None:
        """Has the page itself do something in the midst of the speech to come, where a test might be too late: a
        JavaScript expression, whose value `acted` gives."""
        self.page.evaluate(AT_SPEECH.replace("ACT", act))

    def acted(self) -> Any:
        self.wait_for("() => window.acted !== undefined")
        return self.page.evaluate("acted")

    @property
    def pictures(self) -> list[dict[str, Any]]:
        """Those drawn, oldest first."""
        found: list[dict[str, Any]] = self.page.evaluate("recorded.pictures")
        return found

    @property
    def sounds(self) -> list[dict[str, Any]]:
        """The pieces of sound that were played."""
        found: list[dict[str, Any]] = self.page.evaluate("recorded.sounds")
        return found

    @property
    def state(self) -> str:
        return self.page.inner_text("#state")

    @property
    def notice(self) -> str:
        """What the page complains of, or nothing."""
        return self.page.inner_text("#notice-text") if self.page.is_visible("#notice") else ""

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _socket(self, socket: WebSocket) -> None:
        self.hosts.add(urlsplit(socket.url).netloc)
        socket.on("framesent", lambda data: self.sent.append(_read(data)))
        socket.on("framereceived", lambda data: self.received.append(_read(data)))


def _read(data: str | bytes) -> str | Message:
    if isinstance(data, str):
        return data
    _, kind, _, epoch, pts, _ = HEADER.unpack_from(data)
    return Message(Kind(kind), epoch, pts, data[HEADER.size :])


@pytest.fixture
def visits(chromium: Browser, stack: Stack) -> Iterator[Callable[..., Visit]]:
    """Makes visits to the shared service's page, or another's. In the end none may have complained, but of what was
    `expected`, nor asked another host."""
    made: list[tuple[Visit, tuple[str, ...]]] = []

    def make(address: str = "", expected: tuple[str, ...] = (), **options: Any) -> Visit:
        context = chromium.new_context(**options)
        made.append((Visit(context.new_page(), address or stack.service.http_address), expected))
        return made[-1][0]

    yield make
    for visit, expected in made:
        visit.page.context.close()
        assert [text for text in visit.complaints if not any(part in text for part in expected)] == []
        assert visit.hosts == {visit.address}


@pytest.fixture
def visit(visits: Callable[..., Visit]) -> Visit:
    """A page that is ready, with the avatar."""
    made = visits()
    made.open()
    return made


def wav(samples: NDArray[np.float32], rate: int) -> bytes:
    """A WAV file, PCM16 mono, of samples in [-1, 1]."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()
