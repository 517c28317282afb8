"""One thread a caller: the libraries below this service start threads of their own unless they are told not to."""

from __future__ import annotations

import cv2
import threadpoolctl


def keep_libraries_single_threaded() -> None:
    """Tells OpenCV and NumPy's BLAS, for the whole process, to work in the thread that calls them.

    Frames are the unit of parallelism. OpenBLAS's threads spin between the small products of the mel filter: speech
    cost the compositor 1.8 to 2.4 ms of CPU a frame with them, 1.1 without (two cores).
    """
    cv2.setNumThreads(1)
    threadpoolctl.threadpool_limits(limits=1, user_api="blas")
