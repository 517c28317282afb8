"""A process of its own for the part `memory`: opens a tenant, renders every frame once, says what memory that took."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np

from compositor.blending import CROP_SIZE
from compositor.rendering import Output, render
from compositor.tenant import Tenant

from .process_memory import ROLLUP, rollup_bytes


def touch(repository: Path, name: str) -> dict[str, int]:
    """Bytes that opening the tenant and rendering each of its frames once added, by field of smaps_rollup."""
    cv2.setNumThreads(1)
    mouth = np.full((3, CROP_SIZE, CROP_SIZE), 128, np.uint8)
    before = rollup_bytes()
    tenant = Tenant(repository, name)
    for number in range(tenant.frames):
        render(tenant, number, mouth, Output())
    after = rollup_bytes()
    return {field: after[field] - before[field] for field in ROLLUP}


if __name__ == "__main__":
    json.dump(touch(Path(sys.argv[1]), sys.argv[2]), sys.stdout)
