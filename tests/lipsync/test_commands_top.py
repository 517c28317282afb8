"""`lipsync top` as an operator meets it, before a service that says what it is told to say."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from rich.console import Console

from lipsync import app
from lipsync.commands import watching

COUNTS = {"hits": 1234, "misses": 12, "loads": 10, "failed_loads": 2, "evictions": 3, "lost_races": 0}
DEVICE = {"device": "gpu0", "models": 13, "most_models": 40, "bytes": 1_520_000_000, "most_bytes": 4_000_000_000}


def model(name: str, uses: int, **fields: Any) -> dict[str, Any]:
    values = {"endpoint": "a:1", "name": name, "state": "ready", "device": "gpu0", "bytes": 831_000_000, "leases": 1}
    return {**values, "uses": uses, "last_use_s": 90.0, "pinned": False, **fields}


def endpoint(name: str, **fields: Any) -> dict[str, Any]:
    values = {"endpoint": name, "up": True, "circuit": "closed", "room": True, "leases": 0, "counts": {}, "devices": []}
    return {**values, **fields}


STATS: dict[str, Any] = {
    "process": 1,
    "workers": 1,
    "sessions": [{"tenant": "anna"}, {"tenant": "berta"}, {"tenant": "anna"}],
    "late_share": 0,
    "refused": {"max_sessions": 0, "late": 0, "burst": 0},
    "endpoints": [
        endpoint("a:1", leases=12, counts=COUNTS, devices=[DEVICE]),
        endpoint("b:1", up=False, room=False),
        endpoint("c:1", circuit="open"),
    ],
    "models": [
        model("anna", 42, pinned=True),
        model("berta", 7, state="absent", endpoint="b:1", bytes=0, leases=0, last_use_s=0.0, device=""),
    ],
}
VIEW = """\
Triton a:1: up, 12 under way
  gpu0: 13 of 40 tenants' models, 1.52 GB of 4.00 GB in all
  1,234 hits, 12 misses, 10 loads, 2 failed loads, 3 evictions, 0 lost races
Triton b:1: DOWN, 0 under way
Triton c:1: up, but INFERENCE FAILS, 0 under way
3 sessions, anna 2, berta 1

model  triton  state    device  uses  uses/s  last use  leases  memory
anna*  a:1     ready    gpu0    42    -       10 s      1       831.0 MB
berta  b:1     others'  -       7     -       -         0       -
"""


class Service(HTTPServer):
    """Answers /stats with `answers`, one after another, the last one again and again."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, str]] = []
        self.asked = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def say(self, *stats: object) -> None:
        self.answers += [(200, json.dumps(each)) for each in stats]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Service)
        code, text = self.server.answers[min(self.server.asked, len(self.server.answers) - 1)]
        self.server.asked += self.path == "/stats"
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


Top = Callable[..., tuple[int, str, str]]


@pytest.fixture
def top(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Top:
    """The command in this process, at 100 s after 1970: its exit status and what it wrote."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lipsync", "top", *arguments])
        monkeypatch.setattr("time.time", lambda: 100.0)
        with pytest.raises(SystemExit) as ended:
            app.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_one_look_is_printed(service: Service, top: Top) -> None:
    service.say(STATS)
    assert top("--once", "--server", service.address) == (0, VIEW, "")


def test_an_overload_is_told(service: Service, top: Top) -> None:
    service.say({**STATS, "late_share": 0.123, "refused": {"max_sessions": 0, "late": 7, "burst": 1}})
    _, out, _ = top("--once", "--server", service.address)
    assert "3 sessions, anna 2, berta 1; 12% of the pictures late; refused: 7 (late), 1 (burst)\n" in out


def test_no_models_are_a_heading(service: Service, top: Top) -> None:
    service.say({**STATS, "sessions": [], "endpoints": [], "models": []})
    status, out, _ = top("--once", "--server", service.address)
    assert status == 0
    assert out.splitlines() == [
        "0 sessions",
        "",
        "model  triton  state  device  uses  uses/s  last use  leases  memory",
    ]


def test_rates_are_of_the_time_between_two_looks() -> None:
    before = {("a:1", "anna"): 40, ("b:1", "berta"): 2, ("b:1", "anna"): 0}
    rows = list(watching.lines(STATS, 100.0, before, 0.5))[-2:]
    assert [row.split()[:6] for row in rows] == [
        ["berta", "b:1", "others'", "-", "7", "10.0"],
        ["anna*", "a:1", "ready", "gpu0", "42", "4.0"],
    ]
    again = {**STATS, "models": [model("anna", 3)]}
    assert list(watching.lines(again, 100.0, before, 0.5))[-1].split()[5] == "0.0", "loaded again, and counted anew"


def test_it_goes_on_looking_until_the_service_is_gone(
    service: Service, top: Top, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Console(force_terminal=True, width=100, height=30, highlight=False)
    monkeypatch.setattr(watching, "out", terminal)
    later = {**STATS, "models": [model("anna", 43), model("carla", 1)]}
    service.say(STATS, later)
    service.answers.append((503, "{}"))
    status, out, err = top("--every", "0.1", "--server", service.address)
    assert status == 1
    assert err.startswith(f"error: {service.address}: no compositor's HTTP port (")
    assert "berta" in out
    assert "carla" in out
    assert service.asked == 3


@pytest.mark.parametrize(
    ("code", "text"), [(404, "no"), (200, "<html>"), (200, "[]"), (200, "{}"), (503, json.dumps(STATS))]
)
def test_what_is_no_compositor_is_one_line(service: Service, top: Top, code: int, text: str) -> None:
    service.answers.append((code, text))
    status, out, err = top("--once", "--server", service.address)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert "is it running? give --server" in err


@pytest.mark.parametrize("server", ["127.0.0.1:x", "closed", ""])
def test_addresses_that_lead_nowhere_are_one_line(top: Top, server: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = f"127.0.0.1:{free.getsockname()[1]}" if server == "closed" else server
        status, out, err = top("--once", "--server", server)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
