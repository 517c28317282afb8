from __future__ import annotations

import copy
from typing import Any

import pytest

from compositor.errors import InvalidInput
from training.model_card import BEGIN, END, number, rewritten
from training.targets import KNOWN, UNSEEN, Target, targets

CASE: dict[str, Any] = {
    "sentences": 48, "seconds": 212.4, "closures": 190, "silent_frames": 1800,
    "correlation": 0.93, "lag_frames": -1, "closures_reached": 0.85, "silence_closed": 0.995, "mouth_psnr_db": 30.5,
    "mouth_ssim": 0.93, "colour_step_at_crop": 0.4, "colour_step_at_roi": 1.2, "in_noise": {"correlation": 0.9},
}  # fmt: skip
REPORT: dict[str, Any] = {
    "command": "python -m training evaluate",
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc",
    "machine": {"cpu": "a processor", "cores": 2},
    "models": {"bytes": 6_000_000},
    "cases": {KNOWN: dict(CASE), UNSEEN: dict(CASE)},
    "jitter": {"frames": 50, "predicted": 0.012, "truth": 0.004},
    "milliseconds": {"1": {"both": 9.0}, "2": {"both": 5.5}},
}


def with_(changes: dict[str, Any]) -> dict[str, Any]:
    report = copy.deepcopy(REPORT)
    report["cases"][UNSEEN].update(changes)
    return report


def test_all_targets_of_good_figures_are_met() -> None:
    found = list(targets(REPORT))
    assert all(target.met for target in found)
    assert len(found) == 2 * 8 + 3


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"correlation": 0.79}, "correlation of the opening with the truth"),
        ({"lag_frames": -2}, "best lag"),
        ({"closures_reached": 0.79}, "p, b and m that close the lips"),
        ({"closures_reached": None}, "p, b and m that close the lips"),
        ({"silence_closed": 0.98}, "silent frames that are closed"),
        ({"in_noise": {"correlation": 0.82}}, "correlation lost in noise"),
        ({"mouth_psnr_db": 27.9}, "PSNR of the mouth"),
        ({"mouth_ssim": 0.89}, "SSIM of the mouth"),
        ({"colour_step_at_crop": 2.1}, "mean colour step"),
        ({"colour_step_at_roi": 2.1}, "mean colour step"),
    ],
)
def test_each_limit_counts(changes: dict[str, Any], missed: str) -> None:
    (target,) = [target for target in targets(with_(changes)) if not target.met]
    assert target.what.startswith(missed)
    assert target.what.endswith(UNSEEN)


def test_a_known_voice_must_be_followed_more_closely_than_an_unseen_one() -> None:
    report = with_({"correlation": 0.85})
    report["cases"][KNOWN]["correlation"] = 0.89
    assert [target.what for target in targets(report) if not target.met] == [
        f"correlation of the opening with the truth, {KNOWN}"
    ]


def test_the_card_has_the_figures_between_its_marks_and_keeps_the_rest() -> None:
    found = [
        {"what": "this", "value": 0.9234, "bound": "at least", "limit": 0.9, "unit": "", "met": True},
        {"what": "that", "value": 12.5, "bound": "at most", "limit": 10, "unit": "ms", "met": False},
        {"what": "nothing", "value": None, "bound": "at least", "limit": 80, "unit": "%", "met": False},
    ]
    card = rewritten(f"before\n{BEGIN}\nold\n{END}\nafter\n", {**REPORT, "targets": found})
    assert card.startswith(f"before\n{BEGIN}\n")
    assert card.endswith(f"\n{END}\nafter\n")
    assert "old" not in card
    assert "| this | 0.923 | at least 0.9 | met |" in card
    assert "| that | 12.5 ms | at most 10 ms | **missed** |" in card
    assert "| nothing | nothing to measure | at least 80 % | **missed** |" in card
    assert "Known voices: 48 sentences, 212 s, 190 p, b and m, 1800 silent frames." in card
    assert rewritten(card, {**REPORT, "targets": found}) == card


def test_a_card_without_marks_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no place for figures"):
        rewritten("no marks", REPORT)


@pytest.mark.parametrize(
    ("value", "text"), [(0.90001, "0.9"), (99.95, "100"), (100.0, "100"), (1, "1"), (1.234, "1.23")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_a_limit_itself_is_met() -> None:
    assert Target("", 0.9, "at least", 0.9).met
    assert Target("", 2.0, "at most", 2).met
