from collections import Counter

import pytest

from data_pipeline.synthesis.corpus import Corpus, width_in_em
from data_pipeline.synthesis.rare_characters import passages_showing_all, spread


def corpus_of(*passages: str) -> Corpus:
    ordered = sorted(passages, key=width_in_em)
    return Corpus({"chinese": ordered}, {"chinese": [width_in_em(p) for p in ordered]})


def test_every_drawable_character_appears_often_enough() -> None:
    corpus = corpus_of("甲乙丙", "丙丁", "戊己庚辛壬癸", "甲", "子X")
    drawable = lambda text: "X" not in text  # noqa: E731
    shown = passages_showing_all(corpus, 3, drawable)
    counts = Counter("".join(shown))
    assert all(counts[c] >= 3 for c in "甲乙丙丁戊己庚辛壬癸子")
    assert counts["X"] == 0 and "子" in shown
    assert len(shown) <= 12


def test_passages_are_spread_evenly() -> None:
    slots = list(range(0, 200, 2))
    placed = spread(list("abcdefghij"), slots)
    assert list(placed.values()) == list("abcdefghij") and list(placed) == slots[::10]
    with pytest.raises(ValueError, match="at least 10 text samples, not 3"):
        spread(list("abcdefghij"), slots[:3])
