"""What is written down of a call: its id, how it ended, and who should look."""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import nullcontext, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from compositor.errors import (
    DeadlinePassed,
    InferenceFailed,
    InvalidInput,
    LipsyncError,
    Overloaded,
    RequestTimeout,
    Status,
    Stopping,
    TenantBroken,
    TenantNotFound,
    TritonUnavailable,
)
from compositor.logs import identity
from compositor.metrics import Metrics
from compositor.transports.ledger import CANCELLED, REQUEST_ID, Ledger


def counted(metrics: Metrics) -> dict[tuple[str, str], float]:
    """Calls by method and status."""
    return {
        (sample.labels["method"], sample.labels["status"]): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
        if sample.name == "lipsync_calls_total" and sample.value
    }


def call(ledger: Ledger, outcome: BaseException | None, *, told: bool = True) -> None:
    with ledger.entry("Generate", {}, told=told):
        if outcome is not None:
            raise outcome


@pytest.mark.parametrize(
    ("outcome", "status", "level"),
    [
        (None, "OK", None),
        (InvalidInput("no speech"), "INVALID_ARGUMENT", "INFO"),
        (TenantNotFound("nobody"), "NOT_FOUND", "INFO"),
        (Overloaded("full"), "RESOURCE_EXHAUSTED", "INFO"),
        (Stopping("the service stops"), "UNAVAILABLE", "INFO"),
        (TenantBroken("NaN"), "FAILED_PRECONDITION", "WARNING"),
        (TritonUnavailable("gone"), "UNAVAILABLE", "WARNING"),
        (DeadlinePassed("late"), "DEADLINE_EXCEEDED", "WARNING"),
        (InferenceFailed("odd"), "INTERNAL", "WARNING"),
        (RequestTimeout("no start"), "CANCELLED", "INFO"),
        (ZeroDivisionError(), "INTERNAL", "WARNING"),
        (asyncio.CancelledError(), "CANCELLED", None),
    ],
)
def test_each_call_is_counted_once_by_how_it_ended_and_failures_get_a_line(
    outcome: BaseException | None, status: str, level: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics()
    raised = nullcontext() if outcome is None else pytest.raises(type(outcome))
    with caplog.at_level(logging.DEBUG), raised:
        call(Ledger(metrics), outcome)
    assert counted(metrics) == {("Generate", status): 1}
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    words = f": {outcome.message}" if isinstance(outcome, LipsyncError) else ""
    assert lines == ([(level, f"Generate failed: {status}{words}")] if level else [])


def late(ledger: Ledger) -> None:
    """A call that is cancelled because its deadline has passed."""
    with suppress(asyncio.CancelledError), ledger.entry("Speak", {}) as entry:
        entry.status = "DEADLINE_EXCEEDED"
        raise asyncio.CancelledError


def test_a_block_says_itself_how_its_call_ended(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    ledger = Ledger(metrics)
    with ledger.entry("HTTP", {}) as entry:
        entry.rename("HTTP speak")
        entry.fail(InferenceFailed("in the middle of the stream"))
    with ledger.entry("WebSocket", {}) as entry:
        entry.status = CANCELLED
    late(ledger)
    assert counted(metrics) == {
        ("HTTP speak", "INTERNAL"): 1,
        ("WebSocket", "CANCELLED"): 1,
        ("Speak", "DEADLINE_EXCEEDED"): 1,
    }
    assert [record.getMessage() for record in caplog.records] == [
        "HTTP speak failed: INTERNAL: in the middle of the stream",
        "Speak failed: DEADLINE_EXCEEDED",
    ]


def test_what_is_asked_again_and_again_is_counted_without_a_line(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    with pytest.raises(TritonUnavailable):
        call(Ledger(metrics), TritonUnavailable("gone"), told=False)
    assert counted(metrics) == {("Generate", "UNAVAILABLE"): 1}
    assert not caplog.records


@pytest.mark.parametrize("name", ["a", "7f3a-22:b/c=d@e+f.g_h", "x" * 128])
def test_a_caller_names_its_call(name: str) -> None:
    with Ledger(Metrics()).entry("Generate", {REQUEST_ID: name}) as entry:
        assert entry.request == name
        assert identity()["request"] == name


def test_a_call_has_no_ids_of_the_one_before_on_its_connection() -> None:
    ledger = Ledger(Metrics())
    with ledger.entry("HTTP speak", {REQUEST_ID: "first"}) as entry:
        entry.serve("anna")
    with ledger.entry("HTTP speak", {REQUEST_ID: "second"}):
        assert dict(identity()) == {"request": "second"}


@given(st.text(max_size=200))
def test_a_name_that_could_be_mistaken_for_something_else_is_not_taken(name: str) -> None:
    with Ledger(Metrics()).entry("Generate", {REQUEST_ID: name}) as entry:
        if entry.request == name:
            assert re.fullmatch(r"[!-~]{1,128}", name)
            assert not set(name) & set("\"'\\<>{}$`;,")
        else:
            assert re.fullmatch(r"[0-9a-f]{16}", entry.request)


def test_calls_without_a_name_get_one_each() -> None:
    ledger = Ledger(Metrics())
    names = set()
    for _ in range(100):
        with ledger.entry("Generate", {}) as entry:
            names.add(entry.request)
    assert len(names) == 100


def test_what_has_never_happened_is_zero_and_not_missing() -> None:
    metrics = Metrics()
    Ledger(metrics)
    text = metrics.exposition().decode()
    for status in ("OK", "CANCELLED", *(status.value for status in Status)):
        assert f'lipsync_calls_total{{method="HTTP speak",status="{status}"}} 0.0' in text


def test_frames_are_timed_on_their_way_out() -> None:
    metrics = Metrics()
    with Ledger(metrics).entry("Generate", {}) as entry:
        for _ in range(3):
            entry.sending()
            entry.sent()
        entry.sending()  # nobody took this one
    assert 'lipsync_stage_seconds_count{stage="send"} 3.0' in metrics.exposition().decode()
