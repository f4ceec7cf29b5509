"""The audit of a curation run: what was kept and dropped, by which filter, as JSON and as a page with pictures."""

import hashlib
import heapq
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from data_pipeline.buckets import RATIOS
from data_pipeline.filters.judge import not_run
from data_pipeline.filters.table import find
from data_pipeline.filters.tools import Tools
from data_pipeline.filters.verdict import Verdict
from data_pipeline.page import picture_uri, render
from data_pipeline.stages import Rule, Stage

EXAMPLES = 8
"""Pictures of each filter on the page: dropped ones drawn by hash, and the kept ones nearest to the threshold."""
BINS = 40
SIDE = 160

Shards = dict[str, list[Verdict]]


def audit(stages: tuple[Stage, ...], shards: Shards, tools: Tools) -> dict[str, Any]:
    """Counts, histograms and example keys of a run, as JSON; depends on verdicts and rules alone."""
    verdicts = [v for shard in shards.values() for v in shard]
    kept = [v for v in verdicts if v.dropped_by is None]
    return {
        "samples": len(verdicts),
        "kept": len(kept),
        "filters": [
            {"stage_name": stage.name, "not_run": not_run(rule.filter, tools), **_filter(rule, stage.number, verdicts)}
            for stage in stages
            for rule in stage.rules
        ],
        "labels": {
            name: not_run(name, tools) or _counts(verdicts, lambda v, name=name: [v.labels.get(name, "dropped before")])
            for stage in stages
            for name in stage.labels
        },
        "sources": _counts(verdicts, lambda v: [v.source or "unknown"]),
        "ratios": _counts(verdicts, lambda v: [_ratio(v.size)]),
        "scripts": _counts(verdicts, lambda v: sorted(set(map(script, v.caption)) - {""})),
        "characters": Counter(c for v in kept for c in v.caption if script(c)).most_common(60),
        "distinct_characters": len({c for v in kept for c in v.caption if script(c)}),
    }


def audit_page(result: dict[str, Any], shards: Shards, picture: Callable[[str, str], Any], title: str) -> bytes:
    """The audit as HTML; `picture(shard, key)` gives a PIL image, or None for a broken one."""
    places = {v.key: (name, v) for name, verdicts in shards.items() for v in verdicts}

    def example(key: str, score: float | None) -> dict[str, Any]:
        name, verdict = places[key]
        image = picture(name, key)
        return {
            "picture": picture_uri(image, SIDE) if image else None,
            "caption": verdict.caption,
            "note": verdict.why or (f"{score:.4g}" if score is not None else ""),
            "key": key,
        }

    filters = [
        f | {side: [example(*e) for e in f[side]] for side in ("dropped_examples", "kept_examples")}
        for f in result["filters"]
    ]
    return render("audit.html", title=title, audit=result | {"filters": filters})


def script(character: str) -> str:
    """The script of a letter, by its Unicode name (Latin, Han, Cyrillic ...); '' for anything else."""
    if not character.isalpha():
        return ""
    word = unicodedata.name(character, "?").split(maxsplit=1)[0]
    return {"CJK": "Han"}.get(word, word.capitalize())


def _filter(rule: Rule, stage: int, verdicts: list[Verdict]) -> dict[str, Any]:
    scored = [v for v in verdicts if rule.name in v.scores]
    dropped = [v for v in scored if (v.dropped_by, v.stage) == (rule.name, stage)]
    near = [bound for bound in (rule.least, rule.most) if bound is not None]
    distance = lambda v: min(abs(v.scores[rule.name] - bound) for bound in near)  # noqa: E731
    passed = (v for v in scored if v.dropped_by is None)
    examples = {
        "dropped_examples": heapq.nsmallest(EXAMPLES, dropped, key=_hash),
        "kept_examples": heapq.nsmallest(EXAMPLES, passed, key=lambda v: (distance(v), _hash(v))),
    }
    return {
        "stage": stage,
        "filter": rule.name,
        "title": find(rule.filter).title,
        "rule": str(rule),
        "scored": len(scored),
        "exempt": len(verdicts) - sum(rule.applies(v.source) for v in verdicts),
        "dropped": len(dropped),
        "histogram": _histogram([v.scores[rule.name] for v in scored], near),
    } | {side: [[v.key, v.scores[rule.name]] for v in found] for side, found in examples.items()}


def _hash(verdict: Verdict) -> bytes:
    return hashlib.blake2b(verdict.key.encode(), digest_size=8).digest()


def _histogram(scores: list[float], bounds: list[float]) -> dict[str, Any] | None:
    """Counts in equal bins from the 1st to the 99th percentile and over the thresholds; the end bins take the rest."""
    if len(set(scores)) < 3:
        return None
    low, high = np.percentile(scores, (1, 99))
    low, high = min(low, *bounds), max(high, *bounds)
    pad = 0.04 * (high - low)
    edges = np.linspace(low - pad, high + pad, BINS + 1)
    counts, _ = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)
    return {"from": float(edges[0]), "to": float(edges[-1]), "counts": counts.tolist(), "bounds": bounds}


def _counts(verdicts: Iterable[Verdict], names: Callable[[Verdict], list[str]]) -> dict[str, list[int]]:
    """name -> [samples, kept], the most frequent first."""
    every, kept = Counter(), Counter()
    for verdict in verdicts:
        every.update(names(verdict))
        if verdict.dropped_by is None:
            kept.update(names(verdict))
    return {name: [n, kept[name]] for name, n in sorted(every.items(), key=lambda item: (-item[1], item[0]))}


def _ratio(size: tuple[int, int]) -> str:
    """The nearest of the trained aspect ratios."""
    if not min(size):
        return "broken"
    w, h = min(RATIOS, key=lambda r: abs(np.log(r[0] / r[1] * size[1] / size[0])))
    return f"{w}:{h}"
