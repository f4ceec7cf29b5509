"""Passages that together show every character at least k times (the report resamples rare characters likewise)."""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import cycle, islice

from data_pipeline.synthesis.corpus import Corpus, width_in_em


def passages_showing_all(corpus: Corpus, at_least: int, can_show: Callable[[str], bool]) -> list[str]:
    """Short passages of the corpus in which every character that can be shown occurs `at_least` times or more.

    Characters are taken from the rarest on, each with its shortest passages in turn. A character whose passages can't
    be shown stands alone.
    """
    holders: dict[str, list[str]] = defaultdict(list)
    for passages in corpus.passages.values():
        for passage in passages:
            for char in set(passage) - {" ", "\n"}:
                holders[char].append(passage)
    can_show = functools.cache(can_show)
    chosen: list[str] = []
    seen: Counter[str] = Counter()
    for char in sorted(filter(can_show, holders), key=lambda c: (len(holders[c]), c)):
        missing = at_least - seen[char]
        if missing <= 0:
            continue
        shortest = sorted(holders[char], key=lambda p: (width_in_em(p), p))[: 2 * missing]
        able = list(islice(filter(can_show, shortest), missing)) or [char]
        for passage in islice(cycle(able), missing):
            chosen.append(passage)
            seen.update(passage)
    return chosen


def spread(passages: list[str], slots: list[int]) -> dict[int, str]:
    """Give every passage a slot of its own, evenly spread. ValueError if there are too few."""
    if len(passages) > len(slots):
        raise ValueError(
            f"showing every character so often takes at least {len(passages)} text samples, not {len(slots)}"
        )
    return {slots[i * len(slots) // len(passages)]: passage for i, passage in enumerate(passages)}
