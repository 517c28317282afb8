"""Errors as gRPC tells them: a status code with details, the same for every call."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from ..errors import LipsyncError, Status
from .ledger import CANCELLED, REQUEST_ID, Entry, Ledger

log = logging.getLogger(__name__)

DOMAIN = "lipsync"
Context: TypeAlias = Any
"""A grpc.aio.ServicerContext: grpcio ships no types."""
_EARLY_S, _EARLY = 0.1, 0.01
"""A client whose deadline passes hangs up itself, before it passes here: by so much, and this part of the time that it
gave, which gRPC rounds up on its way."""


def status_of(error: LipsyncError) -> status_pb2.Status:
    """An error as google.rpc.Status: ErrorInfo always, BadRequest and RetryInfo where they say something."""
    details: list[error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    ]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code_pb2.Code.Value(error.status.value), message=error.message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def _abort(context: Context, error: LipsyncError) -> NoReturn:
    status = rpc_status.to_status(status_of(error))
    # Those given here take the place of those that were set.
    metadata = (*(context.trailing_metadata() or ()), *status.trailing_metadata)
    await context.abort(status.code, status.details, metadata)
    raise AssertionError("abort raises")


@contextlib.asynccontextmanager
async def reporting(context: Context, ledger: Ledger, method: str) -> AsyncIterator[Entry]:
    """One call. Ends it with the status of whatever goes wrong inside; what nobody foresaw is logged, not sent."""
    given_s = context.time_remaining()
    try:
        with ledger.entry(method, _headers(context)) as entry:
            context.set_trailing_metadata(((REQUEST_ID, entry.request),))
            try:
                yield entry
            except asyncio.CancelledError:
                entry.status = _why_cancelled(given_s, context.time_remaining())
                raise
    except LipsyncError as error:
        await _abort(context, error)
    except (grpc.aio.AbortError, asyncio.CancelledError):
        raise
    except Exception:
        log.exception("a call failed in a way that nobody foresaw")
        await _abort(context, LipsyncError("internal error; the service's log has the details"))


def _headers(context: Context) -> dict[str, str]:
    """Binary ones aside."""
    return {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}


def _why_cancelled(given_s: float | None, left_s: float | None) -> str:
    """gRPC cancels a call whose deadline has passed as it does one whose client has left."""
    if given_s is None or left_s is None or left_s > _EARLY_S + _EARLY * given_s:
        return CANCELLED
    return Status.DEADLINE_EXCEEDED.value


async def write(context: Context, message: Message) -> None:
    """Sends a message of a stream. Raises CancelledError where the client is gone."""
    try:
        await context.write(message)
    except grpc.aio.InternalError:
        # Its write fails a little before gRPC cancels the call.
        raise asyncio.CancelledError from None
