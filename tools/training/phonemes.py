"""Phonemes in time: the symbols of both synthesisers become one set, the ARPAbet of flite. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from compositor.errors import InvalidInput

PAUSE: Final = "pau"
_VOWELS: Final = "aa ae ah ao aw ax ay eh er ey ih iy ow oy uh uw"
_CONSONANTS: Final = "b ch d dh f g hh jh k l m n ng p r s sh t th v w y z zh"
PHONEMES: Final = frozenset([*_VOWELS.split(), *_CONSONANTS.split(), PAUSE])
BILABIALS: Final = frozenset("pbm")
"""What the lips close for."""
LABIODENTALS: Final = frozenset("fv")
"""What brings the upper teeth to the lower lip."""

# eSpeak's mnemonics for English (its phsource/ph_english files), without the marks that end in `_MARKS`. Several become
# two phonemes, which share the time.
_ESPEAK: Final = {
    "p": "p", "b": "b", "t": "t", "d": "d", "k": "k", "g": "g", "?": "t", "tS": "ch", "dZ": "jh",
    "f": "f", "v": "v", "T": "th", "D": "dh", "s": "s", "z": "z", "S": "sh", "Z": "zh", "h": "hh", "x": "k",
    "m": "m", "n": "n", "N": "ng", "l": "l", "r": "r", "j": "y", "w": "w", "*": "d",
    "i:": "iy", "i": "iy", "I": "ih", "E": "eh", "e": "eh", "a": "ae", "aa": "ae", "A:": "aa", "A": "aa", "0": "aa",
    "O:": "ao", "O": "ao", "o": "ow", "o:": "ow", "V": "ah", "U": "uh", "u": "uw", "u:": "uw", "3:": "er", "3": "er",
    "@": "ax", "@L": "ax l", "aI": "ay", "eI": "ey", "OI": "oy", "aU": "aw", "oU": "ow", "e:": "ey",
    "A@": "aa r", "O@": "ao r", "o@": "ao r", "e@": "eh r", "i@": "ih r", "U@": "uh r", "aI@": "ay er", "aU@": "aw er",
    "i@3": "ih r", "aI3": "ay er", "aU3": "aw er", "I@": "ih r", "VR": "er", "IR": "er", "ER": "eh r", "r-": "r",
}  # fmt: skip
_MARKS: Final = "#2345-~^;"
_VOICELESS_STOPS: Final = (["p"], ["t"], ["k"], ["ch"])
_CLOSURE_S: Final = 0.045  # of silence before the burst, measured in speech of version 1.51 at usual speeds
_SHORTEST_S: Final = 0.015


@dataclass(frozen=True)
class Phone:
    """A phoneme of PHONEMES from `start_s` to `end_s`, seconds from the first sample."""

    symbol: str
    start_s: float
    end_s: float

    @property
    def middle_s(self) -> float:
        return (self.start_s + self.end_s) / 2

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s


def flite_phones(line: str) -> list[Phone]:
    """The phones in what `flite -psdur` prints: each symbol with the second at which it ends, `pau:0.193 p:0.240 ...`.

    Raises InvalidInput on what is no such line or holds an unknown phoneme.
    """
    phones, start = list[Phone](), 0.0
    for entry in line.split():
        symbol, _, end_text = entry.partition(":")
        try:
            end = float(end_text)
        except ValueError:
            raise InvalidInput(f"flite: {entry!r} is not PHONEME:SECONDS; use flite 2.2") from None
        if symbol not in PHONEMES:
            raise InvalidInput(f"flite: the phoneme {symbol!r} is unknown; use an English voice")
        phones.append(Phone(symbol, start, max(start, end)))
        start = max(start, end)
    return phones


def espeak_phones(events: Sequence[tuple[float, str]], end_s: float) -> list[Phone]:
    """The phones of eSpeak's phoneme events, (start in seconds, mnemonic) in order; the last one ends at `end_s`.

    Stress and length marks mean nothing here. eSpeak tells a voiceless stop at its burst; the phone begins with the
    closure before, as in flite. Raises InvalidInput on an unknown mnemonic.
    """
    said = [(start, mnemonic) for start, mnemonic in events if espeak_symbols(mnemonic)]
    starts = _phone_starts(said)
    phones = list[Phone]()
    for (_, mnemonic), start, end in zip(said, starts, [*starts[1:], end_s], strict=False):
        symbols = espeak_symbols(mnemonic)
        step = max(0.0, end - start) / len(symbols)
        phones += [Phone(symbol, start + i * step, start + (i + 1) * step) for i, symbol in enumerate(symbols)]
    return phones


def _phone_starts(events: Sequence[tuple[float, str]]) -> list[float]:
    """When the phones of the events begin: stops at their closure, if the phone before leaves room for it."""
    starts = list[float]()
    for start, mnemonic in events:
        closure = _CLOSURE_S if espeak_symbols(mnemonic)[:1] in _VOICELESS_STOPS else 0.0
        earliest = starts[-1] + _SHORTEST_S if starts else 0.0
        starts.append(max(start - closure, min(start, earliest)))
    return starts


def espeak_symbols(mnemonic: str) -> list[str]:
    """The phonemes that an eSpeak mnemonic stands for, such as ["aa", "r"] for `A@`; none for a mark of its own."""
    plain = mnemonic.strip("'%,=|")
    if not plain or plain in (":", ";"):
        return []
    if plain.startswith("_"):
        return [PAUSE]
    while plain not in _ESPEAK and plain[-1:] and plain[-1] in _MARKS:
        plain = plain[:-1]
    if plain not in _ESPEAK:
        raise InvalidInput(f"espeak: the phoneme {mnemonic!r} is unknown; use an English voice")
    return _ESPEAK[plain].split()


def without_gaps(phones: Iterable[Phone], end_s: float) -> list[Phone]:
    """The phones, cut at `end_s`, with pauses where nothing is said, from 0 to `end_s`; none is without length."""
    filled, at = list[Phone](), 0.0
    for phone in phones:
        start, end = min(phone.start_s, end_s), min(phone.end_s, end_s)
        if start > at:
            filled.append(Phone(PAUSE, at, start))
        if end > start:
            filled.append(Phone(phone.symbol, start, end))
        at = max(at, end)
    if end_s > at:
        filled.append(Phone(PAUSE, at, end_s))
    return filled
