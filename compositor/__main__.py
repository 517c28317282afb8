"""`python -m compositor [settings.yaml]`: the service alone, as its container runs it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def main() -> int:
    """Exit status 0 after a clean stop, 1 where the service cannot start."""
    # The imports below take a second: who is told to stop meanwhile has nothing to end yet.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))

    import asyncio

    from .errors import LipsyncError
    from .logs import set_up_logging
    from .settings import read_settings
    from .signals import ignore_signals
    from .workers import serve

    try:
        settings = read_settings(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
        set_up_logging(settings.logging)
        asyncio.run(serve(settings))
    except LipsyncError as error:
        for line in error.message.splitlines():
            sys.stderr.write(f"error: {line}\n")
        return 1
    finally:
        ignore_signals()
    return 0


if __name__ == "__main__":
    sys.exit(main())
