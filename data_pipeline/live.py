"""An encoded data set that is still being made: the plan that its producers follow, and training on what is there.

Before the first shard, producers write LIVE: what the set is made with and, in order, of which inputs. Shards appear
whole, each with its record; dataset.json, last of all, makes the folder an ordinary data set. A reader needs nothing
but the folder: it waits for the shards that the order calls for.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.claims import Claims
from data_pipeline.dataset import LIVE, EncodedDataset, ShardReader, content_hash, read_fingerprint
from data_pipeline.order import Stopped
from data_pipeline.sample import EncodedSample, Fingerprint
from data_pipeline.sample_index import Table, open_index, shard_table
from data_pipeline.shard_stage import ShardStage
from files import write_json

PLAN = "plan"
"""The claim of who writes the plan, or says that it is fulfilled."""
NEEDED = "needed.json"
"""How far training has got: {"opened": shards that were opened, "wanted": the one that it waits for}; each of its
processes writes the same."""
FETCHED = "fetched"
"""Folder of remote shards, while they are encoded."""
PATIENCE_S = 600.0
"""After so long without a shard or a claim there is nobody who makes any."""
GRACE_S = 15.0
"""Where this node's producers have failed, others may still be at work; claims are renewed more often than that."""
TABLES = 64
"""Indices of shards that a process keeps."""
_ROW_BITS = 32


@dataclass(frozen=True)
class Plan:
    """What a set is made with, and of which inputs."""

    fingerprint: Fingerprint
    settings: dict[str, Any]
    """What the result depends on besides."""
    inputs: dict[str, Any]
    """What each shard is made of, by its name, in order."""

    @classmethod
    def read(cls, folder: Path) -> "Plan | None":
        """That of a folder; None if it has none."""
        try:
            plan = json.loads((folder / LIVE).read_text())
        except FileNotFoundError:
            return None
        return cls(Fingerprint(**plan["fingerprint"]), plan["settings"], dict(plan["inputs"]))

    def as_read(self) -> "Plan":
        """The plan as it comes back from a file."""
        plain = lambda value: json.loads(json.dumps(value))  # noqa: E731
        return replace(self, settings=plain(self.settings), inputs=plain(self.inputs))

    @property
    def identity(self) -> str:
        """What tells a planned set from others, before and after it is whole."""
        return content_hash([asdict(self.fingerprint), list(self.inputs.items()), self.settings])

    def write(self, folder: Path) -> None:
        plan = {"fingerprint": asdict(self.fingerprint), "settings": self.settings}
        write_json(folder / LIVE, plan | {"inputs": list(self.inputs.items())})

    def differences(self, other: "Plan") -> list[str]:
        """In which settings two plans differ, in words; what they are made of does not count."""
        mine, theirs = (asdict(p.fingerprint) | p.settings for p in (self, other))
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        return [f"{n}: {theirs.get(n)} there, {mine.get(n)} here" for n in names]


def announce(stage: ShardStage, plan: Plan, claims: Claims, prepare: Callable[[], None]) -> None:
    """Write the plan, and before it by `prepare` what readers need with it.

    Where more or other inputs are planned than before, the set is no longer whole. ValueError if its shards were made
    with other settings, or somebody is at work on other inputs.
    """
    folder, plan, unfinished = stage.out, plan.as_read(), stage.pending()
    with claims.hold(PLAN):
        there = Plan.read(folder)
        if unfinished and (folder / "dataset.json").exists():
            unfinished = stage.pending()  # somebody may have finished and sealed it since
        if there == plan and not unfinished:
            plan.write(folder)  # anew, for those who wait for it
            return
        if there is None and (folder / "dataset.json").exists():  # made by hand, or by an earlier version
            plan.fingerprint.require(read_fingerprint(folder), str(folder))
        if there is not None and there != plan:
            different, at_work = plan.differences(there), claims.others()
            if different and (at_work or any(folder.glob("*.tar"))):
                raise ValueError(
                    f"{folder} is made with other settings ({'; '.join(different)}): delete it, or choose another"
                )
            if at_work:
                raise ValueError(f"{folder} is being made of other inputs ({at_work[0]} is at work): wait for that")
            for name in there.inputs:
                if there.inputs[name] != plan.inputs.get(name):
                    stage.forget(name)
            (folder / NEEDED).unlink(missing_ok=True)
        (folder / "dataset.json").unlink(missing_ok=True)
        prepare()
        plan.write(folder)


def within(folder: Path, ahead: int) -> Callable[[int], bool]:
    """Whether a shard may be begun: the one that training waits for, and others while less than `ahead` are begun or
    made and were not opened yet."""

    def may_begin(number: int) -> bool:
        try:
            needed = json.loads((folder / NEEDED).read_text())
        except (FileNotFoundError, ValueError):
            needed = {"opened": 0, "wanted": 0}
        if number <= needed["wanted"]:
            return True
        begun = [entry.name for place in (folder, folder / "claims") for entry in os.scandir(place)]
        return sum(name.endswith((".record.json", ".tar.claim")) for name in begun) < needed["opened"] + ahead

    return may_begin


def seal(stage: ShardStage, plan: Plan, claims: Claims) -> None:
    """Make the folder a data set, with its index, if all shards are there and the plan is still this one.

    ValueError if not: somebody has begun another one since.
    """
    folder, plan, unfinished = stage.out, plan.as_read(), stage.pending()
    with claims.hold(PLAN):
        if unfinished or Plan.read(folder) != plan:
            raise ValueError(f"{folder} is being made of other data by now; it is not whole")
        if (folder / "dataset.json").exists():
            return
        open_index(folder)
        write_json(folder / "dataset.json", {"fingerprint": asdict(plan.fingerprint), "identity": plan.identity})
    claims.tidy()
    if not claims.others():
        shutil.rmtree(folder / FETCHED, ignore_errors=True)


def is_live(folder: Path) -> bool:
    """Whether the folder has a plan and is not whole yet."""
    return (folder / LIVE).is_file() and not (folder / "dataset.json").is_file()


def open_dataset(
    folders: tuple[Path, ...],
    mixed_resolutions: bool = False,
    problem: Callable[[], str | None] = lambda: None,
    live: Callable[[Path], bool] = is_live,
) -> "EncodedDataset | LiveDataset":
    """The data set of some folders, of which a single one may still be growing. ValueError if they are none.

    `problem` says why a growing set will not be finished, once that is known; `live` which folders are to be taken for
    growing ones.
    """
    growing = [folder for folder in folders if live(folder)]
    if growing and len(folders) > 1:
        raise ValueError(f"{growing[0]} is still being made; train on it alone, or wait until it is whole")
    return LiveDataset(growing[0], problem) if growing else EncodedDataset(folders, mixed_resolutions)


class LiveDataset:
    """The samples of a set that grows; its answers wait for the shards that they are about.

    ValueError from waiting if nobody makes shards any more.
    """

    mixes_first = False

    def __init__(self, folder: Path, problem: Callable[[], str | None] = lambda: None, patience_s: float = PATIENCE_S):
        from safetensors.torch import load_file

        self.folder, self.problem, self.patience_s = folder, problem, patience_s
        plan = Plan.read(folder)
        if plan is None:
            raise ValueError(f"{folder} has no plan ({LIVE}): nobody is making a data set there")
        self.fingerprint, self.identity = plan.fingerprint, plan.identity
        self._inputs, self._settings = plan.inputs, asdict(plan.fingerprint) | plan.settings
        self.names = list(self._inputs)
        self.shards = len(self.names)
        self.problems: list[str] = []
        self.tokens = _Tokens(self)
        self.txt_empty = load_file(folder / "empty.safetensors")["txt"]
        self.waited_s = 0.0
        """Time spent waiting for shards."""
        self._counts: dict[int, int] = {}
        self._tables: OrderedDict[int, Table] = OrderedDict()
        self._lock = threading.Lock()
        self._reader = ShardReader()

    def made(self) -> int:
        """Shards that are there."""
        return sum(self._is_made(name) for name in self.names)

    def count(self, shard: int, stop: threading.Event | None = None) -> int:
        if shard not in self._counts:
            self.table(shard, stop)
        return self._counts[shard]

    def rows(self, shard: int, stop: threading.Event | None = None) -> np.ndarray:
        return (shard << _ROW_BITS) + np.arange(self.count(shard, stop))

    def table(self, shard: int, stop: threading.Event | None = None) -> Table:
        """The index of a shard, once it is made; the last few are kept."""
        with self._lock:
            if shard in self._tables:
                self._tables.move_to_end(shard)
                return self._tables[shard]
        self.wait([shard], stop or threading.Event())
        table = shard_table(self.folder / self.names[shard])
        with self._lock:
            new = shard not in self._counts
            self._counts[shard], self._tables[shard] = len(table), table
            if len(self._tables) > TABLES:
                self._tables.popitem(last=False)
        if new:
            self.problems += table.problems
            for problem in table.problems:
                tell(f"passed over: {problem}")
            self._say_needed(shard)
        return table

    def key(self, index: int) -> str:
        shard, row = divmod(index, 1 << _ROW_BITS)
        return self.table(shard).key(self.folder, row)

    def __getitem__(self, index: int) -> EncodedSample:
        shard, row = divmod(index, 1 << _ROW_BITS)
        sample = self._reader.read(self.folder, self.table(shard), row)
        return sample if sample.txt_empty is not None else replace(sample, txt_empty=self.txt_empty)

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        self._reader.close()

    def _is_made(self, name: str) -> bool:
        """Whether a shard is there and is that of the plan, not of an earlier one."""
        try:
            record = json.loads((self.folder / name).with_suffix(".record.json").read_text())
        except (FileNotFoundError, ValueError):
            return False
        current = record.get("input") == self._inputs[name] and record.get("settings") == self._settings
        return current and (self.folder / name).exists()

    def ready(self, shard: int) -> bool:
        return self._is_made(self.names[shard])

    def wait(self, shards: Sequence[int], stop: threading.Event) -> None:
        """Return once one of the shards is made. Looks now and then, ever more seldom, at last every two seconds."""
        begin, delay, told = time.monotonic(), 0.02, 10.0
        signs, since = None, begin
        name = self.names[shards[0]]
        self._say_needed(shards[0])
        while not any(map(self.ready, shards)):
            if stop.wait(delay):
                raise Stopped
            now, delay = time.monotonic(), min(2.0, 1.5 * delay)
            if now - begin > told:
                self._tell(name)
                told += 60.0
            if delay == 2.0:
                self._say_needed(shards[0])  # others may have said less, or the disk was full
                if (fresh := self._signs()) != signs:
                    signs, since = fresh, now
            if now - since > GRACE_S and (why := self.problem()):  # and nobody else makes any
                raise ValueError(f"{self.folder}/{name} will not be made: {why}")
            if now - since > self.patience_s:
                raise ValueError(
                    f"nobody has worked on {self.folder} for {self.patience_s:.0f} s and {name} is not made: run "
                    f"data_pipeline/produce.py --out {self.folder} again, then this command"
                )
        self.waited_s += time.monotonic() - begin

    def _say_needed(self, shard: int) -> None:
        """Tell producers how far training is."""
        with suppress(OSError):  # on a disk that is full or not ours, they do without
            write_json(self.folder / NEEDED, {"opened": len(self._counts), "wanted": shard})

    def _signs(self) -> list[tuple[str, int]]:
        """Signs of life: claims, which are renewed all the time, and the folder's files by name."""
        found = [(entry.name, 0) for entry in os.scandir(self.folder) if not entry.name.startswith((NEEDED, ".tmp"))]
        for claim in (self.folder / "claims").glob("*.claim"):
            with suppress(FileNotFoundError):
                found.append((claim.name, claim.stat().st_mtime_ns))
        return sorted(found)

    def _tell(self, name: str) -> None:
        tell(f"waiting for {self.folder}/{name}; {self.made()} of {self.shards} shards are made")


def tell(message: str) -> None:
    """Print a line beside a progress bar."""
    from tqdm import tqdm

    tqdm.write(message, sys.stderr)


class _Tokens:
    """Tokens of each sample in joint attention, by its index."""

    def __init__(self, dataset: LiveDataset):
        self._dataset = dataset

    def __getitem__(self, index: int) -> int:
        shard, row = divmod(int(index), 1 << _ROW_BITS)
        return int(self._dataset.table(shard).columns["tokens"][row])
