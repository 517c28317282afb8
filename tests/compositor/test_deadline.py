from __future__ import annotations

import time

import pytest

from compositor.deadline import Deadline
from compositor.errors import DeadlinePassed


def test_what_remains_is_positive_or_an_error() -> None:
    begin_s = time.monotonic()
    left_s = Deadline.after(60).remaining_s()
    assert 60 - (time.monotonic() - begin_s) <= left_s <= 60
    with pytest.raises(DeadlinePassed):
        Deadline.after(-0.001).remaining_s()
