"""A process that leaks on purpose, `LEAK_BYTES` a cycle, for the part `soak` to catch: a line of stdin is a number of
cycles.

As a server that loads and unloads models does, it takes memory of all sizes and gives it back; a little of each cycle
it keeps.
"""

from __future__ import annotations

import sys
from random import Random

from .child import announce

LEAK_BYTES = 8192
_MOST_BYTES = 4_000_000


def leak(kept: list[bytearray], random: Random) -> None:
    """One cycle. bytearrays of ones, as memory that was never written to is not there."""
    bytearray(b"\x01") * random.randrange(1, _MOST_BYTES)
    kept.append(bytearray(b"\x01") * LEAK_BYTES)


def main() -> None:
    """Obeys every line until there are no more."""
    kept, random = list[bytearray](), Random(0)
    announce("ready")
    for line in sys.stdin:
        for _ in range(int(line)):
            leak(kept, random)
        announce("done")


if __name__ == "__main__":
    main()
