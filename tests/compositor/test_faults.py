"""The codes that errors have over HTTP and WebSocket."""

from __future__ import annotations

from pathlib import Path

from compositor.errors import DeadlinePassed, RequestTimeout, Status
from compositor.transports.faults import CLOSE_CODES, HTTP_CODES, http_code


def test_every_status_has_its_codes() -> None:
    assert {status.value: (HTTP_CODES[status], CLOSE_CODES[status]) for status in Status} == {
        "INVALID_ARGUMENT": (400, 4400),
        "NOT_FOUND": (404, 4404),
        "PERMISSION_DENIED": (403, 4403),
        "FAILED_PRECONDITION": (400, 4412),
        "RESOURCE_EXHAUSTED": (429, 4429),
        "UNAVAILABLE": (503, 4503),
        "DEADLINE_EXCEEDED": (504, 4408),
        "INTERNAL": (500, 4500),
        "UNIMPLEMENTED": (501, 4501),
    }


def test_http_says_whose_time_was_up() -> None:
    assert (http_code(RequestTimeout("no WAV")), http_code(DeadlinePassed("no answer"))) == (408, 504)


def test_close_codes_are_distinct_and_of_the_applications_range() -> None:
    assert len(set(CLOSE_CODES.values())) == len(CLOSE_CODES)
    assert all(4000 <= code <= 4999 for code in CLOSE_CODES.values())


def test_the_page_lists_every_close_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "websocket.md").read_text(encoding="utf-8")
    for status, code in CLOSE_CODES.items():
        assert f"\n| {code} | {status.value} | " in page
