"""Every call, from its door to its end: its id, and what becomes of it in the metrics, the log and the trace."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from ..errors import LipsyncError, RequestTimeout, Status, Stopping
from ..logs import enter, fields, identify
from ..metrics import Metrics
from ..tracing import Span, Tracer, Untraced

log = logging.getLogger(__name__)

REQUEST_ID: Final = "x-request-id"
"""The header by which a caller names a call, and is told its name."""
OK: Final = "OK"
CANCELLED: Final = "CANCELLED"
"""The caller went away, took it back, or did not send it in time."""
METHODS: Final = ("Composite", "Generate", "Speak", "WebSocket", "HTTP speak")
"""The service's own; the others of HTTP come to these as they are called."""
_WELL_FORMED = re.compile(r"[A-Za-z0-9._:@+=/-]{1,128}")
_OURS = frozenset(
    status.value
    for status in (Status.INTERNAL, Status.UNAVAILABLE, Status.FAILED_PRECONDITION, Status.DEADLINE_EXCEEDED)
)
"""Not the caller's fault: somebody should look."""


class Entry:
    """One call."""

    def __init__(self, method: str, request: str, span: Span | None, sent: Callable[[float], None]) -> None:
        """sent: is told how long each frame took to send."""
        self.method, self.request, self.span = method, request, span
        self.status = OK
        """What it ends with: of google.rpc.Code."""
        self.error: LipsyncError | None = None
        self._observe_sent = sent
        self._sending: Span | None = None
        self._ready_s = 0.0
        self._frames = 0

    def rename(self, method: str) -> None:
        """It has turned out what was called."""
        self.method = method
        if self.span is not None:
            self.span.rename(method)

    def serve(self, tenant: str) -> None:
        """It is for this tenant, who is there."""
        identify(tenant=tenant)
        if self.span is not None:
            self.span.note(tenant=tenant)

    def sending(self) -> None:
        """A frame of a whole speech is ready, and sent now."""
        self._ready_s = time.perf_counter()
        if self._sending is None and self.span is not None:
            self._sending = self.span.begin("send")

    def sent(self) -> None:
        """The client's connection took it."""
        self._observe_sent(time.perf_counter() - self._ready_s)
        self._frames += 1

    def close(self) -> None:
        """Nothing is added any more."""
        failure = "" if self.status in (OK, CANCELLED) else self.status
        if self._sending is not None:
            self._sending.note(frames=self._frames)
            self._sending.end(failure)
        if self.span is not None:
            self.span.note(request=self.request, status=self.status)
            self.span.end(failure)

    def fail(self, error: LipsyncError) -> None:
        """The caller is told of this error."""
        self.status = CANCELLED if isinstance(error, RequestTimeout) else error.status.value
        self.error = error


class Ledger:
    """Knows no transport: each opens an entry for each of its calls."""

    def __init__(self, metrics: Metrics, tracer: Tracer | None = None) -> None:
        self._metrics = metrics
        # What never was has no rate: the first failure of all would not be seen.
        for method in METHODS:
            for status in (OK, CANCELLED, *(each.value for each in Status)):
                metrics.calls.labels(method, status)
        self._sent = metrics.observer_of("send")
        self._tracer = tracer or Untraced()

    @contextlib.contextmanager
    def entry(self, method: str, headers: Mapping[str, str], *, told: bool = True) -> Iterator[Entry]:
        """The block serves a call of `method`, a word of ours, which may become clear only in the block. headers: the
        caller's, names in lower case. told: whether it is worth a trace, and its failure a line. What is raised decides
        how the call ended, unless the block does."""
        request = headers.get(REQUEST_ID, "")
        if not _WELL_FORMED.fullmatch(request):
            request = secrets.token_hex(8)
        enter(request=request)
        entry = Entry(method, request, self._tracer.begin(method, headers) if told else None, self._sent)
        try:
            yield entry
        except LipsyncError as error:
            entry.fail(error)
            raise
        except asyncio.CancelledError:
            if entry.status == OK:
                entry.status = CANCELLED
            raise
        except BaseException:
            if entry.status == OK:
                entry.status = Status.INTERNAL.value
            raise
        finally:
            self._close(entry, told)

    def _close(self, entry: Entry, told: bool) -> None:
        self._metrics.calls.labels(entry.method, entry.status).inc()
        entry.close()
        if told and (entry.error or entry.status not in (OK, CANCELLED)):
            reason, message = (entry.error.reason, entry.error.message) if entry.error else ("", "")
            wrong = entry.status in _OURS and not isinstance(entry.error, Stopping)
            level = logging.WARNING if wrong else logging.INFO
            said = fields(method=entry.method, status=entry.status, reason=reason)
            log.log(level, "%s failed: %s%s", entry.method, entry.status, message and f": {message}", extra=said)
