"""The service's logs: one line for each event, as text for people or as JSON for programs.

A line carries the ids of the call and the session that it belongs to: whoever begins one says so with `identify`, and
all tasks that come of it inherit that.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Coroutine, Mapping
from contextvars import Context, ContextVar
from datetime import datetime, timezone
from types import MappingProxyType
from typing import Any, TypeVar

from .settings import LoggingSettings

Answer = TypeVar("Answer")

_ids: ContextVar[Mapping[str, str]] = ContextVar("ids", default=MappingProxyType({}))


def set_up_logging(settings: LoggingSettings) -> None:
    """Log lines on stderr, in the format wanted; Python's warnings among them."""
    lines = Lines()
    lines.setFormatter(Json() if settings.format == "json" else Text())
    logging.basicConfig(level=settings.level.upper(), handlers=[lines])
    logging.captureWarnings(True)


def enter(**ids: str) -> None:
    """A call begins: what this task and those that it starts log from now on carries these ids alone. It may have
    inherited others, for a connection's next call is begun by the task of the one before."""
    _ids.set(ids)


def identify(**ids: str) -> None:
    """What this task and those that it starts log from now on carries these ids, such as request or session."""
    _ids.set({**_ids.get(), **ids})


def identity() -> Mapping[str, str]:
    """The ids of what is under way here."""
    return _ids.get()


def of_nobody(work: Coroutine[Any, Any, Answer]) -> asyncio.Task[Answer]:
    """A task that works for several calls, or outlives the one that began it: what it logs carries no call's ids."""
    return Context().run(asyncio.create_task, work)


def fields(**values: object) -> dict[str, object]:
    """What a line says in words, for programs too: given to a logging call as its `extra`."""
    return {"fields": values}


def one_line(text: str) -> str:
    """Text as it is, but for what is not printable, line ends above all: it may quote a caller, who shall not be able
    to write lines of his own."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


class Lines(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 has no other
    """Lines on stderr. One that cannot be formatted becomes one that says so: the library would write a traceback, in
    the midst of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        try:
            return super().format(record)
        except Exception as error:
            words = "a line of the log cannot be formatted (%s): %r"
            said = (type(error).__name__, record.msg)
            fault = logging.LogRecord(record.name, logging.ERROR, record.pathname, record.lineno, words, said, None)
            return super().format(fault)


class Text(logging.Formatter):
    """Time, level, module, message, ids. The lines of a traceback follow, indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        ids = "".join(f" {name}={value}" for name, value in identity().items())
        time = self.formatTime(record)
        return f"{time} {record.levelname:7} {record.name}: {one_line(record.message)}{one_line(ids)}"

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return "\n".join("    " + one_line(line) for line in super().formatException(ei).split("\n"))


class Json(logging.Formatter):
    """One object a line: time (RFC 3339, UTC), level, logger, process, message; the ids, and what it was given."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
            **identity(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(_plain(line), allow_nan=False)


def _plain(value: object) -> object:
    """What JSON has words for, as it is; the rest as text, NaN and infinity, too."""
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value)
