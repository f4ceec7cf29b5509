"""Filters that look at the data set as a whole, at what all others keep."""

from collections.abc import Callable

import numpy as np

from data_pipeline.filters import balance
from data_pipeline.filters.description import set_filter
from data_pipeline.filters.duplicates import SIDE, find_duplicates
from data_pipeline.filters.verdict import Verdict

Thumbnail = Callable[[int], np.ndarray]


@set_filter(keeps="at most", title="repeats another picture")
def duplicate(verdicts: list[Verdict], thumbnail: Thumbnail) -> list[tuple[float, str]]:
    """1 for a sample that repeats another; of two, the one with more pixels stays, or the earlier one."""
    order = sorted(range(len(verdicts)), key=lambda n: -verdicts[n].size[0] * verdicts[n].size[1])
    pictures = np.array([thumbnail(n) for n in order], np.uint8).reshape(-1, SIDE, SIDE, 3)
    found = [(0.0, "")] * len(verdicts)
    for n, original in find_duplicates(pictures).items():
        found[order[n]] = 1.0, f"repeats {verdicts[order[original]].key}"
    return found


@set_filter(keeps="at most", title="place in its domain over the domain's quota")
def domain_excess(verdicts: list[Verdict], _: Thumbnail) -> list[tuple[float | None, str]]:
    """Above 1 there are too many of a sample's domain."""
    domains = [v.labels.get("domain", "unknown") for v in verdicts]
    return [(x, "") for x in balance.domain_excess([v.key for v in verdicts], domains)]


@set_filter(keeps="at most", title="rank in its category")
def category_rank(verdicts: list[Verdict], _: Thumbnail) -> list[tuple[float | None, str]]:
    """By aesthetics, or without that score by the number of pixels."""
    categories = [v.labels.get("category", "unknown") for v in verdicts]
    quality = [v.scores.get("aesthetics", v.size[0] * v.size[1] * 1e-12) for v in verdicts]
    return [(x, "") for x in balance.category_rank([v.key for v in verdicts], categories, quality)]
