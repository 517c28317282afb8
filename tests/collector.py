"""An OpenTelemetry collector for tests: takes spans by OTLP over gRPC, and keeps them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """spans: all that came. services: the names of who sent them."""

    def __init__(self) -> None:
        self.port = 0
        self.spans: list[Span] = []
        self.services = set[str]()

    def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:  # noqa: N802
        for part in request.resource_spans:
            named = {each.key: each.value.string_value for each in part.resource.attributes}
            self.services.add(named["service.name"])
            for scope in part.scope_spans:
                self.spans.extend(scope.spans)
        return pb.ExportTraceServiceResponse()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


def attributes(span: Span) -> dict[str, object]:
    """What a span says of itself."""
    values = ((each.key, each.value) for each in span.attributes)
    return {key: getattr(value, value.WhichOneof("value") or "string_value") for key, value in values}


@contextlib.contextmanager
def collecting(port: int = 0) -> Iterator[Collector]:
    """A collector on that port, or a free one."""
    collector = Collector()
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
        collector.port = server.add_insecure_port(f"127.0.0.1:{port}")
        server.start()
        try:
            yield collector
        finally:
            server.stop(None).wait()
