"""The benchmark's parts in the order in which they run. A new part adds itself here and nowhere else."""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import (
    baselines,
    compositing,
    efficiency,
    failover,
    inference_memory,
    live,
    load,
    machine,
    memory,
    stages,
    tenants,
    wire,
)
from .figures import PartReport, Report
from .part import Part, Progress, Run, carry_out

PARTS: tuple[Part, ...] = (
    wire.PART,
    compositing.PART,
    memory.PART,
    inference_memory.PART,
    baselines.PART,
    stages.PART,
    efficiency.PART,
    live.PART,
    tenants.part(tenants.Sizes(tenants=3000, pause_s=1, seconds=12, history_s=2, idle_s=4)),
    failover.part(),
    load.part(load.Demand(seconds=15)),
)


def measure(parts: Sequence[Part], progress: Progress, *, quick: bool = False) -> Report:
    """Runs parts one after another, each in a temporary folder of its own, and reports on them and on the machine."""
    begin = os.getloadavg()[0]
    found: list[PartReport] = []
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="lipsync-bench-") as folder:
            found.append(carry_out(part, Run(Path(folder), progress, quick)))
    return Report(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=machine.command_line(),
        quick=quick,
        commit=machine.commit(),
        machine=machine.machine(),
        versions=machine.versions(),
        load_average={"the begin": round(begin, 2), "the end": round(os.getloadavg()[0], 2)},
        parts=found,
    )
