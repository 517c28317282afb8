"""What a call must satisfy before work begins, whichever way it comes: not too many at once, and sound speech."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from ..audio import SAMPLE_RATE
from ..errors import InvalidInput, Overloaded
from ..features import MAX_FPS
from ..pcm import Samples, check_rate


class Admission:
    """Counts the calls being served, over all transports."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def calls(self) -> int:
        """How many are being served."""
        return self._calls

    async def idle(self) -> None:
        """Returns when no call is being served."""
        await self._idle.wait()

    @contextlib.asynccontextmanager
    async def counted(self) -> AsyncIterator[None]:
        """One call. Raises Overloaded where there are too many already."""
        if self._calls >= self._most:
            raise Overloaded(f"{self._most} calls are being served already", retry_after_s=1)
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()


def check_speech(samples: Samples, rate: int, most_s: float) -> None:
    """Raises InvalidInput unless the speech has a usable rate and is neither empty nor longer than `most_s`."""
    check_rate(rate)
    if len(samples) * SAMPLE_RATE < rate:
        raise InvalidInput("the speech is shorter than one sample at 16 kHz", field="speech")
    if len(samples) > most_s * rate:
        raise InvalidInput(
            f"{len(samples) / rate:.0f} s of speech are more than {most_s:.0f} s; send it in parts", field="speech"
        )


def check_fps(fps: int) -> None:
    """Raises InvalidInput for a frame rate out of range."""
    if not 1 <= fps <= MAX_FPS:
        raise InvalidInput(f"fps {fps} is out of range: use 1 to {MAX_FPS}, or 0 for the tenant's own", field="fps")
