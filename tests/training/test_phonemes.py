from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compositor.errors import InvalidInput
from training.phonemes import PAUSE, PHONEMES, Phone, espeak_phones, espeak_symbols, flite_phones, without_gaps


def test_reads_what_flite_prints() -> None:
    assert flite_phones("pau:0.195 p:0.273 l:0.308 iy:0.483 ") == [
        Phone("pau", 0.0, 0.195),
        Phone("p", 0.195, 0.273),
        Phone("l", 0.273, 0.308),
        Phone("iy", 0.308, 0.483),
    ]


@pytest.mark.parametrize("line", ["pau", "pau:x", "qq:0.2", "pau:0.1 0.2"])
def test_refuses_what_flite_does_not_print(line: str) -> None:
    with pytest.raises(InvalidInput):
        flite_phones(line)


@pytest.mark.parametrize(
    ("mnemonic", "symbols"),
    [
        ("p", ["p"]),
        ("tS", ["ch"]),
        ("A@", ["aa", "r"]),
        ("a#", ["ae"]),
        ("I2", ["ih"]),
        ("@-", ["ax"]),
        ("'aI", ["ay"]),
        ("_:", [PAUSE]),
        (";", []),
        ("", []),
    ],
)
def test_espeak_mnemonics_become_the_same_set(mnemonic: str, symbols: list[str]) -> None:
    assert espeak_symbols(mnemonic) == symbols
    assert set(symbols) <= PHONEMES


def test_an_unknown_mnemonic_is_named() -> None:
    with pytest.raises(InvalidInput, match="Y:"):
        espeak_symbols("Y:")


def test_espeak_events_end_where_the_next_begins() -> None:
    phones = espeak_phones([(0.05, "m"), (0.15, "aI"), (0.35, "A@")], 0.55)
    assert [phone.symbol for phone in phones] == ["m", "ay", "aa", "r"]
    assert [phone.start_s for phone in phones] == pytest.approx([0.05, 0.15, 0.35, 0.45])
    assert phones[-1].end_s == pytest.approx(0.55)


def test_a_voiceless_stop_of_espeak_begins_with_its_closure() -> None:
    _, stop, _ = espeak_phones([(0.0, "a"), (0.2, "p"), (0.25, "a")], 0.4)
    assert stop.start_s == pytest.approx(0.155)
    assert stop.end_s == pytest.approx(0.25)


@given(
    st.lists(
        st.tuples(st.floats(0, 0.3), st.sampled_from(["p", "t", "k", "tS", "a", "m", "_:", ";", "A@"])), max_size=20
    )
)
def test_espeak_phones_never_overlap(steps: list[tuple[float, str]]) -> None:
    at, events = 0.0, []
    for step, mnemonic in steps:
        at += step
        events.append((at, mnemonic))
    phones = espeak_phones(events, at + 0.1)
    assert all(phone.length_s >= -1e-9 for phone in phones)
    assert all(a.end_s <= b.start_s + 1e-9 for a, b in pairwise(phones))


@given(st.lists(st.tuples(st.floats(0, 0.2), st.floats(0, 0.2)), max_size=10))
def test_gaps_become_pauses(parts: list[tuple[float, float]]) -> None:
    at, phones = 0.0, []
    for gap, length in parts:
        phones.append(Phone("m", at + gap, at + gap + length))
        at += gap + length
    filled = without_gaps(phones, at + 0.5)
    assert filled[0].start_s == 0
    assert filled[-1].end_s == at + 0.5
    assert all(abs(a.end_s - b.start_s) < 1e-9 for a, b in pairwise(filled))
    assert all(phone.length_s > 0 for phone in filled)


def test_what_ends_after_the_sound_is_cut() -> None:
    filled = without_gaps([Phone("m", 0.1, 0.3), Phone("aa", 0.4, 0.6), Phone("m", 0.6, 0.7)], 0.5)
    assert filled == [
        Phone(PAUSE, 0.0, 0.1),
        Phone("m", 0.1, 0.3),
        Phone(PAUSE, 0.3, 0.4),
        Phone("aa", 0.4, 0.5),
    ]
