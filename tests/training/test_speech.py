from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from compositor.audio import SAMPLE_RATE
from compositor.errors import InvalidInput
from training.phonemes import PAUSE
from training.speech import UNSEEN_VOICE, VOICES, Line, Utterance, Voice, make_lines, speak, utterances
from training.visemes import closures

needs_synthesisers = pytest.mark.skipif(
    not (shutil.which("flite") and shutil.which("espeak-ng")), reason="flite and espeak-ng are not installed"
)
TEXT = "My papa bought a map."


def line(voice: Voice, speed: float = 1.0) -> Line:
    return Line(TEXT, voice, speed, voice.pitch)


def test_splits_share_no_sentence_with_training() -> None:
    train, held_out, unseen = (make_lines(split, 300) for split in ("train", "held_out", "unseen_voice"))
    texts = {entry.text for entry in train}
    assert len(train) + len(held_out) == 300
    assert not texts & {entry.text for entry in held_out}
    assert [entry.text for entry in unseen] == [entry.text for entry in held_out]
    assert {entry.voice for entry in unseen} == {UNSEEN_VOICE}
    assert {entry.voice for entry in train} == set(VOICES)
    assert UNSEEN_VOICE not in VOICES


def test_lines_repeat_themselves() -> None:
    assert make_lines("train", 100) == make_lines("train", 100)
    assert make_lines("train", 100) != make_lines("train", 100, seed=1)
    assert len({entry.key for entry in make_lines("train", 300)}) == len(make_lines("train", 300))


@needs_synthesisers
@pytest.mark.parametrize("voice", [*VOICES, UNSEEN_VOICE], ids=lambda voice: voice.name)
def test_every_voice_tells_when_its_lips_close(voice: Voice) -> None:
    spoken = speak(line(voice))
    assert [phone.symbol for phone in closures(spoken.phones)] == list("mppbmp")
    assert spoken.phones[0].start_s == 0
    assert spoken.phones[-1].end_s == pytest.approx(spoken.seconds)
    assert 1 < spoken.seconds < 5
    assert 0.1 < np.abs(spoken.samples).max() <= 1.01
    for phone in closures(spoken.phones)[1:3]:
        assert _level(spoken, phone.start_s, phone.end_s) < 0.5 * _level(spoken, phone.start_s - 0.1, phone.end_s + 0.1)


def _level(spoken: Utterance, start_s: float, end_s: float) -> float:
    part = spoken.samples[int(start_s * SAMPLE_RATE) : int(end_s * SAMPLE_RATE)]
    return float(np.abs(part).mean())


@needs_synthesisers
@pytest.mark.parametrize("voice", [VOICES[0], VOICES[3]], ids=lambda voice: voice.name)
def test_speech_repeats_itself_and_follows_its_speed(voice: Voice) -> None:
    first, again, fast = speak(line(voice)), speak(line(voice)), speak(line(voice, speed=1.3))
    assert np.array_equal(first.samples, again.samples)
    assert first.phones == again.phones
    said = [sum(p.length_s for p in spoken.phones if p.symbol != PAUSE) for spoken in (first, fast)]
    assert said[0] / said[1] == pytest.approx(1.3, rel=0.15)


@needs_synthesisers
def test_speech_is_kept(tmp_path: Path) -> None:
    lines = [line(VOICES[0]), line(VOICES[3])]
    calls = list[tuple[int, int]]()
    first = list(utterances(lines, tmp_path / "speech", lambda *at: calls.append(at)))
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "speech").iterdir()}
    again = list(utterances(lines, tmp_path / "speech"))
    assert calls == [(1, 2), (2, 2)]
    assert len(kept) == 2
    assert kept == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "speech").iterdir()}
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.samples, other.samples)
        assert one.phones == other.phones


@needs_synthesisers
def test_an_unknown_voice_is_refused() -> None:
    with pytest.raises(InvalidInput, match="nobody"):
        speak(line(Voice("espeak", "nobody", 50)))
