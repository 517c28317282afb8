"""Spans for an OpenTelemetry collector, by OTLP over gRPC. The only importer of opentelemetry, an extra."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc import exporter as library
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import PROCESS_PID, SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .settings import TracingSettings

log = logging.getLogger(__name__)

_EXPORT_S = 3
"""A collector that takes longer loses the spans: a service that stops waits no longer either."""
_PROPAGATOR = TraceContextTextMapPropagator()


class Telemetry:
    """A `tracing.Tracer`. A thread of its own sends the spans; those that it cannot keep up with are dropped."""

    def __init__(self, settings: TracingSettings) -> None:
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
            resource=Resource.create({SERVICE_NAME: settings.service_name, PROCESS_PID: os.getpid()}),
            shutdown_on_exit=False,
        )
        self.exporter = _Exporter(settings.endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(self.exporter))
        self._tracer = self._provider.get_tracer("triton-lipsync")

    def begin(self, name: str, headers: Mapping[str, str]) -> _Span | None:
        caller = _PROPAGATOR.extract(headers)
        span = self._tracer.start_span(name, caller, trace.SpanKind.SERVER)
        return _Span(self._tracer, span) if span.is_recording() else None

    def close(self) -> None:
        # The library waits so long for each batch of a full queue.
        late = threading.Timer(_EXPORT_S, self.exporter.shutdown)
        late.start()
        try:
            self._provider.shutdown()
        finally:
            late.cancel()
            late.join()
            library.logger.removeFilter(self.exporter.is_news)


class _Exporter(OTLPSpanExporter):
    """Says once that the collector takes nothing, and once that it does again; the library says so at every attempt."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint, timeout=_EXPORT_S)
        self._lost = False
        library.logger.addFilter(self.is_news)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        lost = result is not SpanExportResult.SUCCESS
        if self._lost and not lost:
            log.info("the collector takes spans again")
        self._lost = lost
        return result

    def is_news(self, record: logging.LogRecord) -> bool:
        """Which lines of the library's are let through."""
        return record.levelno >= logging.ERROR and not self._lost


class _Span:
    """A `tracing.Span`."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer, self._span = tracer, span

    @property
    def headers(self) -> Mapping[str, str]:
        headers = dict[str, str]()
        _PROPAGATOR.inject(headers, trace.set_span_in_context(self._span))
        return headers

    def begin(self, name: str) -> _Span:
        return _Span(self._tracer, self._tracer.start_span(name, trace.set_span_in_context(self._span)))

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def note(self, **values: str | int | float | bool) -> None:
        self._span.set_attributes({f"lipsync.{name}": value for name, value in values.items()})

    def end(self, failure: str = "") -> None:
        if failure:
            self._span.set_status(trace.StatusCode.ERROR, failure)
        self._span.end()
