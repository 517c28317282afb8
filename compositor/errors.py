"""One tree of errors. Each class carries the status that every transport reports for it; none knows gRPC or HTTP."""

from __future__ import annotations

import enum


class Status(enum.Enum):
    """Outcome of a request, by the canonical name that gRPC and google.rpc.Code give it."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    INTERNAL = "INTERNAL"
    UNIMPLEMENTED = "UNIMPLEMENTED"


class LipsyncError(Exception):
    """Base of everything the service reports on purpose.

    `field` names the offending part of the request or file, when there is one; `retry_after_s` is set where trying
    again helps, and when.
    """

    status = Status.INTERNAL

    def __init__(self, message: str, *, field: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s

    @property
    def reason(self) -> str:
        """The class name as an UPPER_SNAKE_CASE machine-readable reason, as google.rpc.ErrorInfo wants it."""
        name = type(self).__name__
        return "".join("_" + c if c.isupper() and i else c for i, c in enumerate(name)).upper()


class InvalidInput(LipsyncError):
    """The request, or a file handed to a tool, cannot be served as it is. Sending it again will not help."""

    status = Status.INVALID_ARGUMENT


class SettingsInvalid(InvalidInput):
    """The settings file or an environment override is wrong; the service does not start."""


class OriginRefused(LipsyncError):
    """The request comes from a web page that the settings do not allow."""

    status = Status.PERMISSION_DENIED


class TenantNotFound(LipsyncError):
    """No tenant of that name is installed."""

    status = Status.NOT_FOUND


class TenantBroken(LipsyncError):
    """The tenant is installed but its files are damaged or its model does not load or answers nonsense."""

    status = Status.FAILED_PRECONDITION


class TenantReplaced(LipsyncError):
    """Other files were installed under the tenant's name while it was in use. Starting again gives the new ones."""

    status = Status.UNAVAILABLE


class EncoderMissing(LipsyncError):
    """The audio encoder that the tenant names is not installed or does not load."""

    status = Status.FAILED_PRECONDITION


class ExtraMissing(LipsyncError):
    """What was asked for needs an optional part of the package that is not installed."""

    status = Status.UNIMPLEMENTED


class Overloaded(LipsyncError):
    """Queues are full. Try again after `retry_after_s`."""

    status = Status.RESOURCE_EXHAUSTED


class TritonUnavailable(LipsyncError):
    """Triton cannot be reached or is restarting. Trying again helps."""

    status = Status.UNAVAILABLE


class Stopping(LipsyncError):
    """The service stops. Another one, or the next, may serve the request."""

    status = Status.UNAVAILABLE


class DiskFull(LipsyncError):
    """The service cannot write what it has to. It goes on by itself once there is room."""

    status = Status.UNAVAILABLE


class DeadlinePassed(LipsyncError):
    """The caller's time ran out."""

    status = Status.DEADLINE_EXCEEDED


class RequestTimeout(DeadlinePassed):
    """The caller began a request and did not send the rest of it in time."""


class InferenceFailed(LipsyncError):
    """Triton answered with an error or with tensors of the wrong shape."""

    status = Status.INTERNAL
