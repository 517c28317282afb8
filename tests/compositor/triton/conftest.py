"""What tests of Triton's neighbours share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from .kserve import Kserve, serving


@pytest.fixture
async def kserve() -> AsyncIterator[Kserve]:
    async with serving() as kserve:
        yield kserve
