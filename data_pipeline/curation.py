"""Curation in three passes: score every sample (in parallel), decide, write what is kept.

Only the first pass decodes, and each picture once; the last one copies bytes. Scores are kept beside the output, so an
interrupted run goes on, and the decision is a function of the scores alone, however many workers there were.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.atomic import atomic_file
from data_pipeline.filters.duplicates import SIDE, find_duplicates, thumbnail
from data_pipeline.filters.table import FILTERS
from data_pipeline.filters.view import View
from data_pipeline.parallel import map_ordered
from data_pipeline.sample import RawSample
from data_pipeline.shard_stage import ShardStage
from data_pipeline.shards import Problem, read_raw, write_raw
from data_pipeline.stages import Stage

DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Verdict:
    """What became of a sample."""

    key: str
    source: str
    caption: str
    size: tuple[int, int]
    """Width and height in pixels; (0, 0) if the picture is broken."""
    scores: dict[str, float]
    dropped_by: str | None
    """Name of the first filter that dropped it; None if it is kept."""
    why: str = ""


def score(sample: RawSample, stages: tuple[Stage, ...]) -> tuple[Verdict, np.ndarray]:
    """Run the filters of `stages` on a sample, up to the first stage that drops it; also its thumbnail."""
    view, source = View(sample), sample.meta.get("source", "")
    scores: dict[str, float] = {}
    dropped_by = None
    for stage in stages:
        for rule in stage.rules:
            if rule.filter == DUPLICATE or not rule.applies(source):
                continue
            value = scores[rule.filter] = round(FILTERS[rule.filter](view), 5)
            if not rule.keeps(value) and dropped_by is None:
                dropped_by = rule.filter
            if dropped_by == "broken":
                break
        if dropped_by:
            break
    broken = dropped_by == "broken"
    size = (0, 0) if broken else view.image.size
    small = np.zeros((SIDE, SIDE, 3), np.uint8) if broken else thumbnail(view)
    return Verdict(sample.key, source, view.caption, size, scores, dropped_by), small


class Curation:
    """Curation of the raw shards in `data` by `stages`, into `out`."""

    def __init__(self, data: Path, out: Path, stages: tuple[Stage, ...], inputs: dict[str, Any]):
        self.data, self.out, self.stages, self.inputs = data, out, stages, inputs
        self.rules = [rule for stage in stages for rule in stage.rules]
        settings = {"rules": [asdict(rule) | {"exempt": list(rule.exempt)} for rule in self.rules]}
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
        results = map_ordered(partial(_score_task, stages=self.stages), tasks, workers)
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
        """Second pass: the final verdicts by shard, duplicates found among all that no other filter drops.

        Of two, the one with more pixels stays, or the earlier one.
        """
        shards = {name: self._verdicts(name) for name in self.inputs}
        rule = next((rule for rule in self.rules if rule.filter == DUPLICATE), None)
        if rule is None:
            return shards
        left = [
            (name, i)
            for name, verdicts in shards.items()
            for i, v in enumerate(verdicts)
            if v.dropped_by is None and rule.applies(v.source)
        ]
        left.sort(key=lambda at: -shards[at[0]][at[1]].size[0] * shards[at[0]][at[1]].size[1])
        files = {name: np.load(self._thumbnails(name), mmap_mode="r", allow_pickle=False) for name in self.inputs}
        pictures = np.array([files[name][i] for name, i in left], np.uint8).reshape(-1, SIDE, SIDE, 3)
        repeats = find_duplicates(pictures)
        for number, (name, i) in enumerate(left):
            verdict = shards[name][i]
            scores = verdict.scores | {DUPLICATE: float(number in repeats)}
            if number in repeats:
                original = shards[left[repeats[number]][0]][left[repeats[number]][1]]
                verdict = replace(verdict, dropped_by=DUPLICATE, why=f"repeats {original.key}")
            shards[name][i] = replace(verdict, scores=scores)
        return shards

    def write(self, shards: dict[str, list[Verdict]], on_shard: Callable[[], None]) -> ShardStage:
        """Third pass: copy the kept samples, their scores in the record."""
        inputs = {name: {**stamp, "kept": _digest(shards[name])} for name, stamp in self.inputs.items()}
        stage = ShardStage(self.out, inputs, self.scoring.settings)
        for name in stage.pending():
            n = write_raw(stage.target(name), self._kept(name, shards[name]))
            stage.finish(name, {"samples": n, "skipped": self._scores(name)["skipped"]})
            on_shard()
        return stage

    def _kept(self, name: str, verdicts: list[Verdict]) -> Iterator[RawSample]:
        for sample, verdict in zip(read_raw(self.data / name, lambda problem: None), verdicts, strict=True):
            if verdict.dropped_by is None:
                meta = sample.meta | {"scores": sample.meta.get("scores", {}) | verdict.scores}
                yield replace(sample, meta=meta)

    def _scores(self, name: str) -> dict:
        record = self.scoring.record(self._thumbnails(name).name)
        if record is None:
            raise ValueError(f"{self.scoring.out} has no scores of {name}; another run may have changed them")
        return record

    def _thumbnails(self, name: str) -> Path:
        return self.scoring.out / Path(name).with_suffix(".npy")

    def _verdicts(self, name: str) -> list[Verdict]:
        return [Verdict(**v | {"size": tuple(v["size"])}) for v in self._scores(name)["verdicts"]]


def _score_task(task: tuple[str, RawSample], stages: tuple[Stage, ...]) -> tuple[str, tuple[Verdict, np.ndarray]]:
    name, sample = task
    return name, score(sample, stages)


def _digest(verdicts: list[Verdict]) -> str:
    return hashlib.blake2b(json.dumps([v.dropped_by for v in verdicts]).encode(), digest_size=16).hexdigest()
