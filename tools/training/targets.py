"""What the avatar must reach: figures come in, each target with its limit and whether it is met goes out. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

KNOWN: Final = "known voices"
UNSEEN: Final = "unseen voice"
_VOICES: Final = ((KNOWN, 0.9), (UNSEEN, 0.8))
JITTER: Final = 0.02
"""0.6 pixels of a 720-line frame."""
MODELS_MB: Final = 20.0


@dataclass(frozen=True)
class Target:
    """A figure and its limit. `value` is None where there was nothing to measure, which does not meet it."""

    what: str
    value: float | None
    bound: Literal["at least", "at most"]
    limit: float
    unit: str = ""

    @property
    def met(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.limit if self.bound == "at least" else self.value <= self.limit


def targets(report: Mapping[str, Any]) -> Iterator[Target]:
    """The targets of a report as `training.evaluate` puts it together."""
    for voices, correlation in _VOICES:
        found = report["cases"][voices]
        yield Target(
            f"correlation of the opening with the truth, {voices}", found["correlation"], "at least", correlation
        )
        yield Target(f"best lag, {voices}", abs(found["lag_frames"]), "at most", 1, "frames")
        yield Target(
            f"p, b and m that close the lips, {voices}", _percent(found["closures_reached"]), "at least", 80, "%"
        )
        yield Target(f"silent frames that are closed, {voices}", _percent(found["silence_closed"]), "at least", 99, "%")
        lost = found["correlation"] - found["in_noise"]["correlation"]
        yield Target(f"correlation lost in noise 20 dB below the speech, {voices}", lost, "at most", 0.1)
        yield Target(f"PSNR of the mouth, {voices}", found["mouth_psnr_db"], "at least", 28, "dB")
        yield Target(f"SSIM of the mouth, {voices}", found["mouth_ssim"], "at least", 0.9)
        step = max(found["colour_step_at_crop"], found["colour_step_at_roi"])
        yield Target(f"mean colour step at the patch's border, {voices}", step, "at most", 2, "levels")
    trembling = report["jitter"]["predicted"] - report["jitter"]["truth"]
    yield Target("jitter in held vowels, above the truth's", trembling, "at most", JITTER)
    yield Target(
        "tenant and encoder, batch 4, 2 threads", report["milliseconds"]["2"]["both"], "at most", 10, "ms a frame"
    )
    yield Target("both models together", report["models"]["bytes"] / 1e6, "at most", MODELS_MB, "MB")


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
