"""Passages that together show every character at least k times (the report resamples rare characters likewise)."""

from collections import Counter, defaultdict
from collections.abc import Callable

from data_pipeline.synthesis.corpus import Corpus, width_in_em


def passages_showing_all(corpus: Corpus, at_least: int, can_draw: Callable[[str], bool]) -> list[str]:
    """Short passages of the corpus in which every character that can be drawn occurs `at_least` times or more.

    Characters are taken from the rarest on, each with its shortest passages in turn. A character whose passages all
    hold another one that can't be drawn stands alone.
    """
    holders: dict[str, list[str]] = defaultdict(list)
    for passages in corpus.passages.values():
        for passage in passages:
            for char in set(passage) - {" ", "\n"}:
                holders[char].append(passage)
    drawable = {char for char in holders if can_draw(char)}
    chosen: list[str] = []
    seen: Counter[str] = Counter()
    for char in sorted(drawable, key=lambda c: (len(holders[c]), c)):
        shortest = sorted(holders[char], key=lambda p: (width_in_em(p), p))[: 2 * at_least]
        able = [p for p in shortest if drawable.issuperset(set(p) - {" "}) and can_draw(p)] or [char]
        turn = 0
        while seen[char] < at_least:
            passage = able[turn % len(able)]
            chosen.append(passage)
            seen.update(passage)
            turn += 1
    return chosen


def spread(passages: list[str], slots: list[int]) -> dict[int, str]:
    """Give every passage a slot of its own, evenly spread. ValueError if there are too few."""
    if len(passages) > len(slots):
        raise ValueError(
            f"showing every character so often takes at least {len(passages)} text samples, not {len(slots)}"
        )
    return {slots[i * len(slots) // len(passages)]: passage for i, passage in enumerate(passages)}
