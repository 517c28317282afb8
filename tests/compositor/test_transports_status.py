"""Why gRPC cancelled a call: its client left, or its time was up."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from compositor.proto import lipsync_v1_pb2 as pb
from compositor.transports.status import _why_cancelled, write


@pytest.mark.parametrize(
    ("given_s", "left_s", "status"),
    [
        (None, None, "CANCELLED"),
        (60.0, 30.0, "CANCELLED"),
        (60.0, 0.0, "DEADLINE_EXCEEDED"),
        (0.5, 0.02, "DEADLINE_EXCEEDED"),
        (0.5, 0.2, "CANCELLED"),
        (600.0, 1.0, "DEADLINE_EXCEEDED"),  # gRPC sends whole seconds of so many
        (600.0, 10.0, "CANCELLED"),
    ],
)
def test_a_client_hangs_up_a_little_before_its_deadline(
    given_s: float | None, left_s: float | None, status: str
) -> None:
    assert _why_cancelled(given_s, left_s) == status


class Gone:
    """The context of a call whose client is gone, before gRPC has told."""

    async def write(self, message: object) -> None:
        raise grpc.aio.InternalError("execute_batch")


async def test_what_cannot_be_sent_cancels_the_call() -> None:
    context: Any = Gone()
    with pytest.raises(asyncio.CancelledError):
        await write(context, pb.SpeakResponse())
