"""What tests of the compositor share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def own_lines(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What the shared service, which other tests leave running, logs meanwhile is no line of a test's here."""
    caplog.handler.addFilter(_is_own)
    yield
    caplog.handler.removeFilter(_is_own)


def _is_own(record: logging.LogRecord) -> bool:
    return record.threadName != "service"
