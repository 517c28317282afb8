"""What a live session needs of the rest of the service, and how it asks for frames."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..features import Windows
from ..rendering import Rendered
from ..tenant import Tenant


@dataclass(frozen=True)
class Ask:
    """One frame to predict: its background, its audio features float32 (32, 16, 16), what makes a picture of the
    predicted mouth, planes uint8 (3, 328, 328), in a thread, and when it is due, on the session's clock: from then on
    its picture is worth nothing."""

    number: int
    features: NDArray[np.float32]
    finish: partial[Rendered]
    due_s: float


class Stage(Protocol):
    """Where sessions perform."""

    @property
    def pool(self) -> Executor: ...

    async def open(self, name: str) -> Tenant: ...

    async def load(self, tenant: Tenant) -> None:
        """Returns when the tenant's models are loaded."""

    async def embed(self, tenant: Tenant, windows: Windows) -> NDArray[np.float32]:
        """Audio embeddings (n, 512) of mel windows (n, 1, 80, 16)."""

    async def predict(self, tenant: Tenant, asks: Sequence[Ask]) -> list[Rendered]:
        """A finished picture for each."""

    def shown(self, *, late: bool) -> None:
        """A tick of a session was shown; late: the process is too busy."""
