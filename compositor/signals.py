"""The signals that stop a service: the first SIGTERM or SIGINT lets what is under way end, the second cuts it off."""

from __future__ import annotations

import asyncio
import signal
import sys

_NUMBERS = signal.SIGTERM, signal.SIGINT


class Signals:
    """What this process was told, from now on; made within a running event loop, in its main thread.

    Only these signals count: one that comes after `stop` was set by other means is the first.
    """

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self._told = False
        for number in _NUMBERS:
            asyncio.get_running_loop().add_signal_handler(number, self._take)

    def _take(self) -> None:
        if self._told:
            self.hurry.set()
        self._told = True
        self.stop.set()


def leave_when_told() -> None:
    """Until there are `Signals`, one ends the process in order: SystemExit in its main thread, status 0."""
    for number in _NUMBERS:
        signal.signal(number, lambda *_: sys.exit(0))


def ignore_signals() -> None:
    """For the end: what is left takes a second or two, and impatience would only spoil the exit status."""
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_IGN)
