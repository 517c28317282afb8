"""Errors as HTTP and WebSocket tell them: a code of theirs, and the same JSON. Pure."""

from __future__ import annotations

from typing import Any, Final

from ..errors import LipsyncError, RequestTimeout, Status

HTTP_CODES: Final = {
    Status.INVALID_ARGUMENT: 400,
    Status.NOT_FOUND: 404,
    Status.PERMISSION_DENIED: 403,
    Status.FAILED_PRECONDITION: 400,
    Status.RESOURCE_EXHAUSTED: 429,
    Status.UNAVAILABLE: 503,
    Status.DEADLINE_EXCEEDED: 504,
    Status.INTERNAL: 500,
    Status.UNIMPLEMENTED: 501,
}
"""As google/rpc/code.proto maps them."""
CLOSE_CODES: Final = {
    Status.INVALID_ARGUMENT: 4400,
    Status.NOT_FOUND: 4404,
    Status.PERMISSION_DENIED: 4403,
    Status.FAILED_PRECONDITION: 4412,
    Status.RESOURCE_EXHAUSTED: 4429,
    Status.UNAVAILABLE: 4503,
    Status.DEADLINE_EXCEEDED: 4408,
    Status.INTERNAL: 4500,
    Status.UNIMPLEMENTED: 4501,
}
"""WebSocket close codes, of the range that RFC 6455 7.4.2 leaves to applications."""


def http_code(error: LipsyncError) -> int:
    """504 says that the service took too long; where its caller did, HTTP has a code of its own."""
    return 408 if isinstance(error, RequestTimeout) else HTTP_CODES[error.status]


def error_fields(error: LipsyncError) -> dict[str, Any]:
    """An error as JSON shows it; retry_after_s is null where trying again does not help."""
    return {
        "status": error.status.value,
        "reason": error.reason,
        "message": error.message,
        "field": error.field,
        "retry_after_s": error.retry_after_s,
    }
