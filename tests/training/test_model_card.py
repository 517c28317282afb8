from __future__ import annotations

from typing import Any

import pytest

from compositor.errors import InvalidInput
from training.model_card import BEGIN, END, number, rewritten

CASE = {"sentences": 48, "seconds": 212.4, "closures": 190, "silent_frames": 1800}
REPORT: dict[str, Any] = {
    "command": "python -m training evaluate",
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc",
    "machine": {"cpu": "a processor", "cores": 2},
    "cases": {"known voices": CASE, "unseen voice": CASE},
}
FOUND = [
    {"what": "this", "value": 0.9234, "bound": "at least", "limit": 0.9, "unit": "", "met": True},
    {"what": "that", "value": 12.5, "bound": "at most", "limit": 10, "unit": "ms", "met": False},
    {"what": "nothing", "value": None, "bound": "at least", "limit": 80, "unit": "%", "met": False},
]


def test_the_card_has_the_figures_between_its_marks_and_keeps_the_rest() -> None:
    card = rewritten(f"before\n{BEGIN}\nold\n{END}\nafter\n", {**REPORT, "targets": FOUND})
    assert card.startswith(f"before\n{BEGIN}\n")
    assert card.endswith(f"\n{END}\nafter\n")
    assert "old" not in card
    assert "| this | 0.923 | at least 0.9 | met |" in card
    assert "| that | 12.5 ms | at most 10 ms | **missed** |" in card
    assert "| nothing | nothing to measure | at least 80 % | **missed** |" in card
    assert "Known voices: 48 sentences, 212 s, 190 p, b and m, 1800 silent frames." in card
    assert rewritten(card, {**REPORT, "targets": FOUND}) == card


def test_a_card_without_marks_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no place for figures"):
        rewritten("no marks", REPORT)


@pytest.mark.parametrize(
    ("value", "text"), [(0.90001, "0.9"), (99.95, "100"), (100.0, "100"), (1, "1"), (1.234, "1.23")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text
