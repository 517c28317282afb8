"""Traces of calls: what a collector gets, whose children the spans are, and nothing at all where nobody asked."""

from __future__ import annotations

import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from opentelemetry.sdk.trace.export import SpanExportResult

from compositor import telemetry
from compositor.deadline import Deadline
from compositor.errors import SettingsInvalid
from compositor.settings import TracingSettings, TritonSettings
from compositor.tracing import Span, Tracer, Untraced, headers_onwards, open_tracer, traced
from compositor.triton.inference import Triton

from ..collector import Collector, attributes, collecting
from .triton.kserve import good, serving

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
KEPT = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-other": "1"}
NOT_KEPT = {"traceparent": f"00-{TRACE}-{PARENT}-00"}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """One that is waited for, however busy the machine is."""
    monkeypatch.setattr(telemetry, "_EXPORT_S", 60)
    with collecting() as collector:
        yield collector


def tracer_to(collector: Collector, ratio: float = 1) -> Tracer:
    return open_tracer(TracingSettings(endpoint=collector.endpoint, service_name="faces", sample_ratio=ratio))


def begun(tracer: Tracer, headers: dict[str, str]) -> Span:
    span = tracer.begin("Generate", headers)
    assert span is not None
    return span


def test_nothing_is_traced_unless_an_endpoint_is_set() -> None:
    tracer = open_tracer(TracingSettings())
    assert tracer.begin("Generate", KEPT) is None
    tracer.close()
    assert isinstance(tracer, Untraced)


def test_what_is_not_traced_costs_no_more_than_a_look() -> None:
    assert traced(None, "inference") is traced(None, "blend")
    assert isinstance(traced(None, "inference"), nullcontext)
    with traced(None, "inference"):
        assert headers_onwards() is None


def test_the_parts_of_a_call_are_its_children(collector: Collector) -> None:
    tracer = tracer_to(collector)
    call = begun(tracer, {})
    with traced(call, "inference"):
        onwards = headers_onwards()
    assert headers_onwards() is None
    call.note(tenant="anna", frames=3)
    call.rename("Generate again")
    call.end()
    tracer.close()

    (root,), (part,) = collector.named("Generate again"), collector.named("inference")
    assert not root.parent_span_id
    assert part.parent_span_id == root.span_id
    assert part.trace_id == root.trace_id
    assert onwards is not None
    assert onwards["traceparent"].startswith(f"00-{root.trace_id.hex()}-{part.span_id.hex()}-")
    assert attributes(root) == {"lipsync.tenant": "anna", "lipsync.frames": 3}
    assert root.start_time_unix_nano <= part.start_time_unix_nano
    assert part.end_time_unix_nano <= root.end_time_unix_nano
    assert collector.services == {"faces"}


def test_a_callers_trace_goes_on(collector: Collector) -> None:
    tracer = tracer_to(collector, ratio=0)
    begun(tracer, KEPT).end()
    assert tracer.begin("Generate", NOT_KEPT) is None
    assert tracer.begin("Generate", {}) is None
    tracer.close()
    (span,) = collector.spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)


@pytest.mark.parametrize("parent", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", "00-" + "x" * 9000])
def test_a_trace_that_is_none_is_not_taken_up(collector: Collector, parent: str) -> None:
    tracer = tracer_to(collector)
    begun(tracer, {"traceparent": parent}).end()
    tracer.close()
    (span,) = collector.spans
    assert not span.parent_span_id
    assert span.trace_id.hex() != TRACE


def test_what_failed_says_so(collector: Collector) -> None:
    tracer = tracer_to(collector)
    call = begun(tracer, {})
    with pytest.raises(ZeroDivisionError), traced(call, "inference"):
        1 / 0  # noqa: B018
    call.end("INTERNAL")
    tracer.close()
    told = {span.name: (span.status.code, span.status.message) for span in collector.spans}
    assert told == {
        "inference": (Status.STATUS_CODE_ERROR, "ZeroDivisionError"),
        "Generate": (Status.STATUS_CODE_ERROR, "INTERNAL"),
    }


def test_without_the_extra_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "compositor.telemetry", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(SettingsInvalid, match=r"pip install 'triton-lipsync\[tracing\]'"):
        open_tracer(TracingSettings(endpoint="http://127.0.0.1:4317"))


def test_a_collector_that_is_away_does_not_keep_the_service_from_its_end() -> None:
    with collecting() as gone:
        pass
    tracer = tracer_to(gone)
    begun(tracer, {}).end()
    tracer.close()
    assert not gone.spans


def test_a_collector_that_hangs_keeps_it_no_longer_whatever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_EXPORT_S", 0.3)
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracer = open_tracer(TracingSettings(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}"))
        for _ in range(1000):  # 300 s, at 0.3 s each
            begun(tracer, {}).end()
        begin_s = time.monotonic()
        tracer.close()
        assert time.monotonic() - begin_s < 100


@contextmanager
def reserved_port() -> Iterator[int]:
    """One on which nobody listens, nor can but a server that shares it, as gRPC's do."""
    with socket.socket() as shared:
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        shared.bind(("127.0.0.1", 0))
        yield shared.getsockname()[1]


def test_a_collector_that_is_away_is_told_of_once_and_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(telemetry, "_EXPORT_S", 0.5)
    with caplog.at_level("INFO"), reserved_port() as port:
        tracer = open_tracer(TracingSettings(endpoint=f"http://127.0.0.1:{port}"))
        assert isinstance(tracer, telemetry.Telemetry)
        for _ in range(3):
            assert tracer.exporter.export(()) is SpanExportResult.FAILURE
        with collecting(port):
            monkeypatch.setattr(tracer.exporter, "_timeout", 30)
            for _ in range(2):
                assert tracer.exporter.export(()) is SpanExportResult.SUCCESS
        tracer.close()
    away, back = [record for record in caplog.records if "opentelemetry" in record.name or "telemetry" in record.name]
    assert (away.levelname, back.levelname) == ("ERROR", "INFO")
    assert re.search("UNAVAILABLE|DEADLINE_EXCEEDED", away.getMessage())
    assert back.getMessage() == "the collector takes spans again"


async def test_every_request_to_triton_says_whose_it_is(collector: Collector) -> None:
    tracer = tracer_to(collector)
    headers: list[dict[str, str]] = []
    async with serving(good) as kserve:
        kserve.seen = headers.append
        triton = Triton(TritonSettings(shared_memory="off"), kserve.endpoint)
        for call in (None, begun(tracer, {}), None):
            with traced(call, "inference"):
                mouths = await triton.mouths(
                    "anna", np.zeros(1, np.int32), np.zeros((1, 32, 16, 16), np.float32), Deadline.after(30)
                )
                mouths.release()
        await triton.close()
    tracer.close()
    (part,) = collector.named("inference")
    assert ["traceparent" in each for each in headers] == [False, True, False]
    assert part.span_id.hex() in headers[1]["traceparent"]
