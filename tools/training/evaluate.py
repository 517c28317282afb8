"""Evaluates the two models together: their files go in; a report, a picture and the model card's figures come out."""

from __future__ import annotations

import datetime
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from lipsync.avatar import Avatar
from lipsync.bench.machine import commit, machine, versions
from lipsync.preparation import Report
from lipsync.trained import CARD, PICTURE, REPORT
from training.evaluation import Observed, Pair, Truth, figures, jitter, observe, openings_of
from training.evaluation_picture import Moment, choose_moments, draw_evaluation
from training.filming import Film, filming, milliseconds_a_frame, prepare_repository
from training.metrics import Openings
from training.model_card import rewritten
from training.recordings import Recording, recording_figures, recordings
from training.speech import Split, make_lines, utterances
from training.takes import Take, make_take, with_noise
from training.targets import KNOWN, UNSEEN, Target, targets

_CASES: Final[dict[str, Split]] = {KNOWN: "held_out", UNSEEN: "unseen_voice"}
_SLOWLY: Final = 0.3  # the speed at which vowels are long enough to hold still
_SLOW_LINES: Final = 12


@dataclass(frozen=True)
class Selection:
    """Which sentences are spoken: the first `lines` of those held out when `sentences` were made with `seed`. `cache`
    keeps the speech."""

    sentences: int
    seed: int
    lines: int
    cache: Path


@dataclass(frozen=True)
class _Case:
    """What came back of one split."""

    observed: list[Observed]
    noisy: list[Openings]


@dataclass(frozen=True)
class _Evidence:
    """All that came back: the cases by name, held vowels, recorded words, and `milliseconds` by threads."""

    cases: dict[str, _Case]
    held: list[Observed]
    words: list[tuple[Recording, Openings]]
    milliseconds: dict[str, dict[str, float]]


def evaluate_models(avatar: Path, encoder: Path, output: Path, said: Selection, report: Report) -> list[Target]:
    """Writes evaluation.json and evaluation.png into `output`, and the figures into its MODEL_CARD.md if there is one.

    Raises InvalidInput where a model is refused or a synthesiser is missing.
    """
    takes = {name: _takes(said, split, report) for name, split in _CASES.items()}
    slow, moments = _slow_takes(said, report), choose_moments(takes[KNOWN])
    with tempfile.TemporaryDirectory(prefix="lipsync-evaluation-") as folder:
        repository = prepare_repository(Path(folder), avatar, encoder, report)
        evidence = _gather(repository, Path(folder), takes, slow, moments, said.seed, report)
    found = {
        "command": f"python -m training evaluate --lines {said.lines}",
        "sentences": said.sentences,
        "seed": said.seed,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "models": {**_digests(avatar, encoder), "bytes": avatar.stat().st_size + encoder.stat().st_size},
        **_figures(evidence),
    }
    reached = list(targets(found))
    found["targets"] = [{**asdict(target), "met": target.met} for target in reached]
    _write(output, found, evidence, _pairs(evidence.cases[KNOWN].observed, moments))
    return reached


def _gather(
    repository: Path,
    folder: Path,
    takes: dict[str, list[Take]],
    slow: list[Take],
    moments: list[Moment],
    seed: int,
    report: Report,
) -> _Evidence:
    milliseconds = {str(threads): milliseconds_a_frame(repository, threads) for threads in (1, 2)}
    truth = Truth(Avatar())
    with filming(repository, folder) as film:
        cases = {
            name: _film(name, own, film, truth, moments if name == KNOWN else [], seed, report)
            for name, own in takes.items()
        }
        held = [_observe("held vowels", slow, number, film, truth, [], report) for number in range(len(slow))]
        words = [(word, openings_of(word.samples, film, truth.gauge)) for word in recordings()]
    return _Evidence(cases, held, words, milliseconds)


def _figures(evidence: _Evidence) -> dict[str, Any]:
    return {
        "cases": {name: figures(case.observed, case.noisy) for name, case in evidence.cases.items()},
        "jitter": jitter(evidence.held),
        "recorded_speech": recording_figures(evidence.words) if evidence.words else None,
        "milliseconds": evidence.milliseconds,
    }


def _takes(said: Selection, split: Split, report: Report) -> list[Take]:
    lines = make_lines(split, said.sentences, said.seed)[: said.lines]
    return [make_take(one) for one in utterances(lines, said.cache, lambda done, total: report("speech", done, total))]


def _slow_takes(said: Selection, report: Report) -> list[Take]:
    """Held-out sentences in known voices of flite, so slowly that vowels are held."""
    lines = make_lines("held_out", said.sentences, said.seed)
    chosen = [replace(line, speed=_SLOWLY) for line in lines if line.voice.synthesiser == "flite"][:_SLOW_LINES]
    return [make_take(one) for one in utterances(chosen, said.cache, lambda done, total: report("speech", done, total))]


def _film(
    name: str, takes: list[Take], film: Film, truth: Truth, moments: Sequence[Moment], seed: int, report: Report
) -> _Case:
    """A case's takes as they come back, as they are and in noise."""
    case = _Case([], [])
    for number, take in enumerate(takes):
        case.noisy.append(openings_of(with_noise(take, seed + number).samples, film, truth.gauge))
        keep = [moment.frame for moment in moments if moment.take == number]
        case.observed.append(_observe(name, takes, number, film, truth, keep, report))
    return case


def _observe(
    name: str, takes: Sequence[Take], number: int, film: Film, truth: Truth, keep: Sequence[int], report: Report
) -> Observed:
    observed = observe(takes[number], film, truth, keep)
    report(name, number + 1, len(takes))
    return observed


def _digests(avatar: Path, encoder: Path) -> dict[str, str]:
    """What the figures are of."""
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in (("avatar_sha256", avatar), ("encoder_sha256", encoder))
    }


def _pairs(observed: Sequence[Observed], moments: Sequence[Moment]) -> list[tuple[str, Pair]]:
    return [(moment.phone, observed[moment.take].kept[moment.frame]) for moment in moments]


def _write(output: Path, found: dict[str, Any], evidence: _Evidence, pairs: Sequence[tuple[str, Pair]]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / REPORT).write_text(json.dumps(found, indent=1) + "\n")
    card = output / CARD
    if card.exists():
        card.write_text(rewritten(card.read_text(), found))
    known, unseen = evidence.cases[KNOWN], evidence.cases[UNSEEN]
    voices = [one.take.voice for one in known.observed]
    other = next((number for number, voice in enumerate(voices) if voice != voices[0]), -1)
    overlays = [
        (f"{KNOWN}, {voices[0]}", known.observed[0], None),
        (f"{KNOWN}, {voices[other]}", known.observed[other], known.noisy[other]),
        (f"{UNSEEN}, {unseen.observed[0].take.voice}", unseen.observed[0], unseen.noisy[0]),
    ]
    draw_evaluation(output / PICTURE, overlays, evidence.words, pairs)
