"""How this process's memory is tidied: Python's garbage collector and the C library's allocator, told to do in small
steps, or not at all, what would make pictures late."""

from __future__ import annotations

import ctypes
import gc

_COLLECTED_AT = 5_000
"""New containers that set off a collection of the youngest. By Python's 700 there are 70 times as many, for frames in
the making are counted, too, and they go by themselves."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h; mallopt(3)."""
_KEPT_BYTES, _MAPPED_BYTES = 16 << 20, 4 << 20


def keep_pauses_short() -> None:
    """Tells both, for the whole process; to be called once, when all modules are there.

    Collections leave out what is there by now: the modules' 66,000 containers, with which a full one takes 50 to 90 ms
    in which nothing else is done. Blocks of up to 4 MiB that are freed stay with the process, up to 16 MiB of them in a
    row: by glibc's defaults every picture's buffers go back to the kernel, to be fetched anew page by page (20 page
    faults a picture with 16 live sessions on two cores, 12 with this). Where the C library is another one, its
    allocator stays as it is.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECTED_AT, *gc.get_threshold()[1:])
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
        library.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
