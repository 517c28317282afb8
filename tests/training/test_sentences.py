from __future__ import annotations

import pytest

from compositor.errors import InvalidInput
from training.sentences import make_sentences


def test_the_same_arguments_give_the_same_distinct_sentences() -> None:
    made = make_sentences(3000)
    assert made == make_sentences(3000)
    assert len(set(made)) == 3000
    assert made[:100] == make_sentences(100)
    assert made[:100] != make_sentences(100, seed=1)


def test_sentences_are_whole() -> None:
    for sentence in make_sentences(1000):
        assert "{" not in sentence
        assert sentence[0].isupper()
        assert sentence[-1] in ".?"
        assert "  " not in sentence
        assert not set(sentence[:-1]) & set(".?!;:"), "one sentence each: synthesisers count time anew after them"


def test_an_exhausted_grammar_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.sentences._TEMPLATES", ("that is {quality}",))
    assert len(make_sentences(5)) == 5
    with pytest.raises(InvalidInput, match="ask for fewer"):
        make_sentences(100)
