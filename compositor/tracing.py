"""Traces of calls: what the service says of them, whoever listens. Off unless an endpoint is set.

A call that is traced carries its span; one that is not carries None, and costs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Protocol, TypeAlias

from .errors import SettingsInvalid
from .settings import TracingSettings

Value: TypeAlias = str | int | float | bool


class Span(Protocol):
    """A part of a call, from its begin to `end`."""

    @property
    def headers(self) -> Mapping[str, str]:
        """What makes another service's spans children of this one: W3C Trace Context."""

    def begin(self, name: str) -> Span:
        """A part of this one."""

    def rename(self, name: str) -> None: ...

    def note(self, **values: Value) -> None:
        """What is to be known of it."""

    def end(self, failure: str = "") -> None:
        """failure: why it came to nothing, if it did."""


class Tracer(Protocol):
    """Where spans go."""

    def begin(self, name: str, headers: Mapping[str, str]) -> Span | None:
        """The span of a call whose caller sent these headers, names in lower case; None where it is not traced."""

    def close(self) -> None:
        """Sends what is left; takes seconds at most, and blocks."""


class Untraced:
    """Traces nothing."""

    def begin(self, name: str, headers: Mapping[str, str]) -> None:
        return None

    def close(self) -> None:
        """Nothing is left."""


def open_tracer(settings: TracingSettings) -> Tracer:
    """The tracer that the settings describe. Raises SettingsInvalid where its libraries are not installed."""
    if not settings.endpoint:
        return Untraced()
    try:
        from .telemetry import Telemetry
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise SettingsInvalid(
            "tracing.endpoint: traces need the extra `tracing`: pip install 'triton-lipsync[tracing]'; or unset it",
            field="tracing.endpoint",
        ) from error
    return Telemetry(settings)


_under_way: ContextVar[Span | None] = ContextVar("span", default=None)


def traced(span: Span | None, name: str) -> AbstractContextManager[object]:
    """The block is a part of a call that may be traced, and `headers_onwards` are this part's."""
    return _NOTHING if span is None else _traced(span, name)


_NOTHING = nullcontext()


@contextlib.contextmanager
def _traced(span: Span, name: str) -> Iterator[None]:
    part = span.begin(name)
    before = _under_way.set(part)
    failure = ""
    try:
        yield
    except BaseException as error:
        failure = type(error).__name__
        raise
    finally:
        _under_way.reset(before)
        part.end(failure)


def headers_onwards() -> Mapping[str, str] | None:
    """What requests made here are to carry, so that whoever serves them can add to the trace."""
    span = _under_way.get()
    return None if span is None else span.headers
