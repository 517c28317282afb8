"""The service's logs."""

from __future__ import annotations

import logging


def set_up_logging(level: str) -> None:
    """Log lines on stderr: time, level, module, message."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
