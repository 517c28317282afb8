"""What every part of the benchmark is: a name, and a function from a `Run` to a `PartReport`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from compositor.errors import LipsyncError

from .figures import PartReport

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


@dataclass(frozen=True)
class Run:
    """What a part gets: an empty folder of its own, somebody to tell its progress, and whether sizes shall be tiny, to
    see that everything works."""

    folder: Path
    progress: Progress
    quick: bool = False


@dataclass(frozen=True)
class Part:
    """One part of the benchmark; `run` measures it."""

    name: str
    title: str
    run: Callable[[Run], PartReport]


def carry_out(part: Part, run: Run) -> PartReport:
    """Runs a part and adds what it took; a part that fails says why, and the others go on."""
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        report = part.run(run)
    except LipsyncError as error:
        report = PartReport(part.name, part.title, failure=error.message)
    except OSError as error:
        report = PartReport(part.name, part.title, failure=": ".join(filter(None, [error.filename, error.strerror])))
    return replace(report, wall_s=time.perf_counter() - wall, cpu_s=time.process_time() - cpu)
