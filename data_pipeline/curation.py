"""Curation in three passes: score every sample (in parallel), decide, write what is kept.

Only the first pass decodes, and each picture once; the last one copies bytes. Scores are kept beside the output, so an
interrupted run goes on, and the decision is a function of the scores alone, however many workers there were.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.filters import balance
from data_pipeline.filters.description import SetFilter
from data_pipeline.filters.duplicates import SIDE, thumbnail
from data_pipeline.filters.judge import judge
from data_pipeline.filters.table import FILTERS, LABELS, find, own_code
from data_pipeline.filters.tools import Tools
from data_pipeline.filters.verdict import Verdict
from data_pipeline.filters.view import View
from data_pipeline.parallel import map_ordered
from data_pipeline.sample import RawSample
from data_pipeline.shard_stage import ShardStage
from data_pipeline.shards import Problem, read_raw, write_raw
from data_pipeline.stages import Stage
from files import atomic_file

Place = tuple[str, int]
"""(shard, position in it)."""


def score(sample: RawSample, stages: tuple[Stage, ...], tools: Tools) -> tuple[Verdict, np.ndarray]:
    """Run the filters and labels of `stages` on a sample, up to the stage that drops it; also its thumbnail.

    What lacks a tool is left out, and so are the filters that look at the whole set.
    """
    view = View(sample, tools)
    verdict = judge(view, stages)
    return verdict, np.zeros((SIDE, SIDE, 3), np.uint8) if verdict.dropped_by == "broken" else thumbnail(view)


class Curation:
    """Curation of the raw shards in `data` by `stages`, into `out`."""

    def __init__(self, data: Path, out: Path, stages: tuple[Stage, ...], inputs: dict[str, Any], tools: Tools):
        self.data, self.out, self.stages, self.inputs, self.tools = data, out, stages, inputs, tools
        paths = {name: path and str(path) for name, path in vars(tools).items()}
        filters = {rule.filter: find(rule.filter) for stage in stages for rule in stage.rules}
        needs = {x.needs for x in (*FILTERS.values(), *LABELS.values(), *filters.values()) if x.needs}
        missing = sorted(need for need in needs if tools.missing(need))
        settings = json.loads(json.dumps({"stages": [asdict(s) for s in stages], "tools": paths, "missing": missing}))
        if own := own_code(stages):
            settings["own filters"] = own
        thumbnails = {Path(name).with_suffix(".npy").name: stamp for name, stamp in inputs.items()}
        self.scoring = ShardStage(out / "scores", thumbnails, settings)

    def score(self, workers: int, on_sample: Callable[[], None]) -> None:
        """First pass: thumbnails and verdicts (duplicates apart) of every shard, into `out`/scores."""
        pending = self.scoring.pending()
        self.scoring.out.mkdir(parents=True, exist_ok=True)
        problems: dict[str, list[Problem]] = {name: [] for name in pending}
        tasks = (
            (name, sample)
            for name in pending
            for sample in read_raw(self.data / Path(name).with_suffix(".tar"), problems[name].append)
        )
        results = map_ordered(partial(_score_task, stages=self.stages, tools=self.tools), tasks, workers)
        waiting = iter(pending)
        for name, group in groupby(results, key=lambda result: result[0]):
            for empty in iter(waiting.__next__, name):
                self._finish_scores(empty, [], [], problems[empty])
            verdicts, thumbnails = [], []
            for _, (verdict, picture) in group:
                verdicts.append(verdict)
                thumbnails.append(picture)
                on_sample()
            self._finish_scores(name, verdicts, thumbnails, problems[name])
        for empty in waiting:
            self._finish_scores(empty, [], [], problems[empty])

    def _finish_scores(self, name: str, verdicts: list[Verdict], thumbnails: list, problems: list[Problem]) -> None:
        with atomic_file(self.scoring.target(name)) as file:
            np.save(file, np.array(thumbnails, np.uint8).reshape(-1, SIDE, SIDE, 3), allow_pickle=False)
        record = {"verdicts": [asdict(v) for v in verdicts], "skipped": [asdict(p) for p in problems]}
        self.scoring.finish(name, record)

    def decide(self) -> dict[str, list[Verdict]]:
        """Second pass: the final verdicts by shard, after the filters that look at all that the others keep."""
        shards = {name: self._verdicts(name) for name in self.inputs}
        for stage in self.stages:
            for rule in stage.rules:
                if not isinstance(find(rule.filter), SetFilter):
                    continue
                places = [
                    (name, i)
                    for name, verdicts in shards.items()
                    for i, v in enumerate(verdicts)
                    if v.dropped_by is None and rule.applies(v.source)
                ]
                found = find(rule.filter)([shards[name][i] for name, i in places], self._pictures(places))
                for (name, i), (value, why) in zip(places, found, strict=True):
                    shards[name][i] = shards[name][i].scored(rule, stage.number, value, why)
        return shards

    def _pictures(self, places: list[Place]) -> Callable[[int], np.ndarray]:
        """The thumbnail of the i-th of `places`."""
        opened = cache(lambda name: np.load(self._thumbnails(name), mmap_mode="r", allow_pickle=False))
        return lambda i: opened(places[i][0])[places[i][1]]

    def copies(self, shards: dict[str, list[Verdict]]) -> dict[str, list[int]]:
        """How often each sample is to be written: 0 if it is dropped, more than once for rare characters."""
        wanted = max((stage.rare_characters for stage in self.stages), default=0)
        kept = [(name, i) for name, vs in shards.items() for i, v in enumerate(vs) if v.dropped_by is None]
        times = {name: [0] * len(verdicts) for name, verdicts in shards.items()}
        for (name, i), n in zip(kept, balance.repeats([shards[n][i].caption for n, i in kept], wanted), strict=True):
            times[name][i] = n
        return times

    def write(self, shards: dict[str, list[Verdict]], on_shard: Callable[[], None]) -> ShardStage:
        """Third pass: copy the kept samples, scores and labels in their record."""
        times = self.copies(shards)
        inputs = {name: {**stamp, "kept": _digest(shards[name], times[name])} for name, stamp in self.inputs.items()}
        stage = ShardStage(self.out, inputs, self.scoring.settings)
        for name in stage.pending():
            n = write_raw(stage.target(name), self._kept(name, shards[name], times[name]))
            stage.finish(name, {"samples": n, "skipped": self._scores(name)["skipped"]})
            on_shard()
        return stage

    def _kept(self, name: str, verdicts: list[Verdict], times: list[int]) -> Iterator[RawSample]:
        samples = read_raw(self.data / name, lambda problem: None)
        for sample, verdict, n in zip(samples, verdicts, times, strict=True):
            meta = verdict.noted(sample.meta)
            for copy in range(n):
                key = f"{sample.key}-copy{copy}" if copy else sample.key
                yield replace(sample, key=key, meta=meta)

    def _scores(self, name: str) -> dict:
        record = self.scoring.record(self._thumbnails(name).name)
        if record is None:
            raise ValueError(f"{self.scoring.out} has no scores of {name}; another run may have changed them")
        return record

    def _thumbnails(self, name: str) -> Path:
        return self.scoring.out / Path(name).with_suffix(".npy")

    def _verdicts(self, name: str) -> list[Verdict]:
        return [Verdict(**v | {"size": tuple(v["size"])}) for v in self._scores(name)["verdicts"]]


def _score_task(
    task: tuple[str, RawSample], stages: tuple[Stage, ...], tools: Tools
) -> tuple[str, tuple[Verdict, np.ndarray]]:
    name, sample = task
    return name, score(sample, stages, tools)


def _digest(verdicts: list[Verdict], times: list[int]) -> str:
    """Changes with whatever the written shard shows of a decision."""
    shown = [[v.scores, v.labels, n] for v, n in zip(verdicts, times, strict=True)]
    return hashlib.blake2b(json.dumps(shown, sort_keys=True).encode(), digest_size=16).hexdigest()
