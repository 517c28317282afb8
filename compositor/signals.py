"""The signals that stop a service: the first SIGTERM or SIGINT lets what is under way end, the second cuts it off."""

from __future__ import annotations

import asyncio
import signal


class Signals:
    """What this process was told, from now on; made within a running event loop, in its main thread."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._take)

    def _take(self) -> None:
        if self.stop.is_set():
            self.hurry.set()
        self.stop.set()
