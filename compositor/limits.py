"""What the operating system allows this process."""

from __future__ import annotations

import logging
import resource

log = logging.getLogger(__name__)

FEW_FILES = 4096
"""Each open tenant takes some files, and each connection one."""


def allow_open_files() -> int:
    """Raises the limit on open files as far as this process may, and gives it.

    The usual soft limit, 1024, is there for select(2) of old; it would keep about 170 tenants open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError) as error:
            log.warning("the limit on open files stays at %d: %s", soft, error)
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        log.warning(
            "at most %d files may be open: tenants and connections share them; raise the hard limit (ulimit -Hn) to %d",
            *(soft, FEW_FILES),
        )
    return soft
