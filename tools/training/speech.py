"""Synthetic speech with phoneme times: lines of text with voices come in, 16 kHz samples and phones go out.

Speaks through flite and eSpeak NG (Debian: flite, espeak-ng, libespeak-ng1) and keeps what was spoken on disk. A line
gives the same speech wherever the same versions of both are installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from compositor.audio import SAMPLE_RATE, Samples, resample
from compositor.errors import InvalidInput
from compositor.pcm import pcm16, read_wav
from training.phonemes import Phone, espeak_phones, flite_phones, without_gaps
from training.sentences import make_sentences

Split = Literal["train", "held_out", "unseen_voice"]


@dataclass(frozen=True)
class Voice:
    """A voice of a synthesiser. `pitch` is its usual one: Hz for flite, 0-100 for eSpeak."""

    synthesiser: Literal["flite", "espeak"]
    name: str
    pitch: float


VOICES: Final = (
    Voice("flite", "slt", 170),
    Voice("flite", "awb", 120),
    Voice("flite", "kal16", 105),
    Voice("espeak", "en-us", 45),
    Voice("espeak", "en-us+f3", 55),
    Voice("espeak", "en-gb-x-rp+f2", 50),
    Voice("espeak", "en-us+Annie", 50),
    Voice("espeak", "en-gb-scotland+m3", 45),
    Voice("espeak", "en+m7", 40),
)
"""The voices of training. flite's speak _FLITE_SHARE of the lines, for they were made from recordings of people."""
UNSEEN_VOICE: Final = Voice("flite", "rms", 95)
"""Never trained on."""
_FLITE_SHARE: Final = 0.6
_WORDS_PER_MINUTE: Final = 165  # of eSpeak at speed 1; close to flite's
_HELD_OUT_SHARE: Final = 0.06  # of the sentences, never trained on
_FORMAT: Final = 1  # of the cache


@dataclass(frozen=True)
class Line:
    """What is to be said and how. `speed` 1 is the voice's own; `pitch` is in the voice's units."""

    text: str
    voice: Voice
    speed: float
    pitch: float

    @property
    def key(self) -> str:
        """A name for the line that differs from every other line's."""
        content = json.dumps([_FORMAT, asdict(self)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Utterance:
    """A spoken line: mono float32 `samples` at 16 kHz in [-1, 1], and its phones from first to last sample."""

    line: Line
    samples: Samples
    phones: tuple[Phone, ...]

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE


def make_lines(split: Split, count: int, seed: int = 0) -> list[Line]:
    """The lines of a split when there are `count` sentences in all; splits share no sentence with `train`.

    `held_out` are the sentences that are never trained on, in known voices; `unseen_voice` the same in UNSEEN_VOICE.
    """
    random = np.random.default_rng([seed, 2])
    lines = [_line(text, random) for text in make_sentences(count, seed)]
    held_out = max(1, round(count * _HELD_OUT_SHARE))
    if split == "train":
        return lines[held_out:]
    if split == "held_out":
        return lines[:held_out]
    return [Line(line.text, UNSEEN_VOICE, line.speed, UNSEEN_VOICE.pitch) for line in lines[:held_out]]


def _line(text: str, random: np.random.Generator) -> Line:
    kind = "flite" if random.random() < _FLITE_SHARE else "espeak"
    voices = [voice for voice in VOICES if voice.synthesiser == kind]
    voice = voices[int(random.integers(len(voices)))]
    speed, pitch = random.uniform(0.85, 1.2), voice.pitch * random.uniform(0.85, 1.2)
    return Line(text, voice, round(float(speed), 2), round(float(pitch), 1))


def speak(line: Line) -> Utterance:
    """Synthesises a line. Raises InvalidInput where the synthesiser is missing or refuses."""
    samples, rate, phones = (_flite if line.voice.synthesiser == "flite" else _espeak)(line)
    speech = resample(samples, rate)
    return Utterance(line, speech, tuple(without_gaps(phones, len(speech) / SAMPLE_RATE)))


def utterances(lines: list[Line], cache: Path, report: Callable[[int, int], None] | None = None) -> Iterator[Utterance]:
    """The lines spoken, from `cache` (a directory, made here) where they were spoken before.

    `report(done, total)` is called after each.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for done, line in enumerate(lines, start=1):
        path = cache / f"{line.key}.npz"
        if not path.exists():
            _store(speak(line), path)
        yield _load(line, path)
        if report is not None:
            report(done, len(lines))


def _store(utterance: Utterance, path: Path) -> None:
    pcm = np.clip(np.round(utterance.samples * 32767), -32768, 32767).astype(np.int16)
    symbols = np.array([phone.symbol for phone in utterance.phones])
    bounds = np.array([(phone.start_s, phone.end_s) for phone in utterance.phones])
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    with partial.open("wb") as file:
        np.savez(file, pcm=pcm, symbols=symbols, bounds=bounds)
    partial.replace(path)


def _load(line: Line, path: Path) -> Utterance:
    with np.load(path) as stored:
        samples = stored["pcm"].astype(np.float32) / 32767
        bounds = stored["bounds"].tolist()
        symbols = stored["symbols"].tolist()
    return Utterance(line, samples, tuple(Phone(s, *b) for s, b in zip(symbols, bounds, strict=True)))


def _flite(line: Line) -> tuple[Samples, int, list[Phone]]:
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "line.wav"
        settings = [f"duration_stretch={1 / line.speed:.4f}", f"int_f0_target_mean={line.pitch:g}"]
        options = [part for setting in settings for part in ("--setf", setting)]
        printed = _run(["flite", "-voice", line.voice.name, *options, "-t", line.text, "-o", str(wav), "-psdur"])
        samples, rate = read_wav(wav.read_bytes())
    return samples, rate, flite_phones(printed.decode())


def _espeak(line: Line) -> tuple[Samples, int, list[Phone]]:
    request = {
        "voice": line.voice.name,
        "words_per_minute": round(_WORDS_PER_MINUTE * line.speed),
        "pitch": round(line.pitch),
        "text": line.text,
    }
    head, _, pcm = _run([sys.executable, "-m", "training.espeak_process", json.dumps(request)]).partition(b"\n")
    spoken = json.loads(head)
    samples = pcm16(np.frombuffer(pcm, np.int16).astype("<i2").tobytes())
    rate = int(spoken["rate"])
    return samples, rate, espeak_phones(spoken["phonemes"], len(samples) / rate)


def _run(command: list[str]) -> bytes:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    try:
        done = subprocess.run(command, capture_output=True, check=True, env=environment)
    except FileNotFoundError:
        raise InvalidInput(f"{command[0]} is missing; install the packages flite and espeak-ng") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"])[-1]
        raise InvalidInput(f"speech: {command[0]} failed ({last[-200:]}); see that its voices are installed") from None
    return done.stdout
