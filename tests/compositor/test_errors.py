from __future__ import annotations

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2

from compositor import errors, jpeg
from compositor.errors import LipsyncError
from compositor.residency import models
from compositor.transports.status import status_of
from compositor.triton import connection


def every_error() -> list[type[LipsyncError]]:
    found, queue = [], [LipsyncError]
    while queue:
        kind = queue.pop()
        if kind.__module__.startswith("compositor"):
            found.append(kind)
        queue += kind.__subclasses__()
    return found


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_every_error_becomes_a_status_with_details(kind: type[LipsyncError]) -> None:
    status = status_of(kind("what is wrong", field="tenant", retry_after_s=1.5))
    assert status.code == grpc.StatusCode[kind.status.value].value[0]
    assert status.message == "what is wrong"
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail, message in zip(status.details, (info, bad, retry), strict=True):
        assert detail.Unpack(message)
    assert info.reason == kind("").reason
    assert info.reason == info.reason.upper()
    assert bad.field_violations[0].field == "tenant"
    assert retry.retry_delay.ToMilliseconds() == 1500


def test_the_table_of_statuses() -> None:
    table = {
        errors.InvalidInput: "INVALID_ARGUMENT",
        errors.SettingsInvalid: "INVALID_ARGUMENT",
        errors.OriginRefused: "PERMISSION_DENIED",
        errors.TenantNotFound: "NOT_FOUND",
        errors.TenantBroken: "FAILED_PRECONDITION",
        errors.TenantReplaced: "UNAVAILABLE",
        errors.EncoderMissing: "FAILED_PRECONDITION",
        errors.ExtraMissing: "UNIMPLEMENTED",
        errors.Overloaded: "RESOURCE_EXHAUSTED",
        errors.TritonUnavailable: "UNAVAILABLE",
        errors.Stopping: "UNAVAILABLE",
        errors.DiskFull: "UNAVAILABLE",
        errors.DeadlinePassed: "DEADLINE_EXCEEDED",
        errors.RequestTimeout: "DEADLINE_EXCEEDED",
        errors.InferenceFailed: "INTERNAL",
        errors.LipsyncError: "INTERNAL",
        connection.ModelNotLoaded: "INTERNAL",
        connection.RegionLost: "UNAVAILABLE",
        connection.GivenUp: "UNAVAILABLE",
        connection.Unresponsive: "UNAVAILABLE",
        connection.KeyRefused: "INTERNAL",
        connection.NoAnswer: "DEADLINE_EXCEEDED",
        jpeg.LibraryMissing: "INTERNAL",
        models.OutOfMemory: "RESOURCE_EXHAUSTED",
    }
    assert {kind: kind.status.value for kind in every_error()} == table


def test_reasons_read_as_upper_snake_case() -> None:
    assert errors.TenantNotFound("").reason == "TENANT_NOT_FOUND"


def test_details_are_left_out_where_they_say_nothing() -> None:
    status = status_of(errors.TenantBroken("no"))
    assert status.code == code_pb2.FAILED_PRECONDITION
    assert len(status.details) == 1
