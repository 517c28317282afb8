from __future__ import annotations

import copy
from typing import Any

import pytest

from training.targets import KNOWN, UNSEEN, Target, targets

CASE: dict[str, Any] = {
    "correlation": 0.93, "lag_frames": -1, "closures_reached": 0.85, "silence_closed": 0.995, "mouth_psnr_db": 30.5,
    "mouth_ssim": 0.93, "colour_step_at_crop": 0.4, "colour_step_at_roi": 1.2, "in_noise": {"correlation": 0.9},
}  # fmt: skip
REPORT: dict[str, Any] = {
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


@pytest.mark.parametrize(
    ("part", "values", "missed"),
    [
        ("jitter", {"predicted": 0.03, "truth": 0.005}, "jitter in held vowels, above the truth's"),
        ("milliseconds", {"1": {"both": 9.0}, "2": {"both": 10.1}}, "tenant and encoder, batch 4, 2 threads"),
        ("models", {"bytes": 20_000_001}, "both models together"),
    ],
)
def test_the_limits_of_both_models_together_count(part: str, values: dict[str, Any], missed: str) -> None:
    assert [target.what for target in targets({**REPORT, part: values}) if not target.met] == [missed]


def test_a_known_voice_must_be_followed_more_closely_than_an_unseen_one() -> None:
    report = with_({"correlation": 0.85})
    report["cases"][KNOWN]["correlation"] = 0.89
    assert [target.what for target in targets(report) if not target.met] == [
        f"correlation of the opening with the truth, {KNOWN}"
    ]


def test_a_limit_itself_is_met() -> None:
    assert Target("", 0.9, "at least", 0.9).met
    assert Target("", 2.0, "at most", 2).met
