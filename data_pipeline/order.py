"""The order in which samples are seen, pass after pass: a function of the seed and of the data alone.

A cursor, plain JSON, says where in the order one is. `Shuffled` permutes a whole set, which must be known for that.
`ByShard` takes the shards as they come and permutes some at a time, so that it can begin before the set is whole and
ends as it would have with the whole of it. `Mixture` draws from several orders in shares that may move.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from files import fsync

Cursor = Any
"""Of `Shuffled` and `ByShard`: [epoch, index of the next sample in that epoch's order]."""
Place = tuple[int, int, Cursor]
"""Index of a sample in its data set, epoch, and the cursor after it."""
MIXED_SHARDS = 8
"""Shards that `ByShard` permutes together."""
POLL_S = 0.5


class Stopped(Exception):
    """Waiting was ended by the reader."""


class Sharded(Protocol):
    """What an order has to know of a data set. The set may still grow: then its answers wait."""

    shards: int
    """Their number, known from the beginning."""
    mixes_first: bool
    """Whether already the first pass permutes them."""

    def count(self, shard: int, stop: threading.Event | None = None) -> int:
        """Samples of a shard, once it is there."""

    def rows(self, shard: int, stop: threading.Event | None = None) -> np.ndarray:
        """Indices of its samples, to read them by."""

    def ready(self, shard: int) -> bool:
        """Whether a shard is there."""

    def wait(self, shards: Sequence[int], stop: threading.Event) -> None:
        """Return once one of these is there."""


class Order(Protocol):
    """Samples from a cursor on, for ever."""

    first: Cursor
    """That of the beginning."""

    def describe(self) -> str:
        """What a cursor is a cursor of, besides the data."""

    def places(self, cursor: Cursor, stop: threading.Event) -> Iterator[Place]:
        """`stop` ends waiting for a set that grows."""


def permutation(n: int, *key: object) -> np.ndarray:
    """A permutation of range(n), a function of `key`.

    Sorts by raw words of Philox, whose stream numpy guarantees to keep, unlike its shuffles.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(n)
    return np.argsort(words, kind="stable")


class Shuffled:
    """A permutation of all samples in each pass."""

    first = [0, 0]

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed

    def describe(self) -> str:
        return f"Shuffled, seed {self.seed}"

    def places(self, cursor: Cursor, stop: threading.Event) -> Iterator[Place]:
        epoch, index = cursor
        while True:
            order = permutation(self.n, "order", self.seed, epoch)
            for at in range(index, self.n):
                yield int(order[at]), epoch, [epoch, at + 1] if at + 1 < self.n else [epoch + 1, 0]
            epoch, index = epoch + 1, 0


class ByShard:
    """Groups of MIXED_SHARDS shards one after another, the samples of a group permuted.

    The first pass takes the shards as they are numbered, which is how producers make them; the others, and the first
    over several folders, permute them.
    """

    first = [0, 0]

    def __init__(self, dataset: Sharded, seed: int, mixed: int | None = None):
        self.dataset, self.seed, self.mixed = dataset, seed, mixed or MIXED_SHARDS

    def describe(self) -> str:
        return f"{type(self).__name__}, seed {self.seed}, {self.mixed} shards mixed"

    def places(self, cursor: Cursor, stop: threading.Event) -> Iterator[Place]:
        epoch, index = cursor
        while True:
            done = 0
            for number, (group, last) in enumerate(self._groups(epoch, stop)):
                counts = [self.dataset.count(shard, stop) for shard in group]
                if index >= done + sum(counts):  # taken before the cursor
                    done += sum(counts)
                    continue
                rows = np.concatenate([self.dataset.rows(shard, stop) for shard in group])
                order = permutation(len(rows), "group", self.seed, epoch, number)
                for at in range(max(0, index - done), len(rows)):
                    ends = last and at + 1 == len(rows)
                    yield int(rows[order[at]]), epoch, [epoch + 1, 0] if ends else [epoch, done + at + 1]
                done += len(rows)
            if not done:
                raise ValueError("the data hold no sample")
            epoch, index = epoch + 1, 0

    def _groups(self, epoch: int, stop: threading.Event) -> Iterator[tuple[list[int], bool]]:
        """Shards that are permuted together, and whether they are the pass's last."""
        mixes = epoch or self.dataset.mixes_first
        shards = permutation(self.dataset.shards, "shards", self.seed, epoch) if mixes else range(self.dataset.shards)
        shards = [int(shard) for shard in shards]
        for first in range(0, len(shards), self.mixed):
            yield shards[first : first + self.mixed], first + self.mixed >= len(shards)


class AsReady(ByShard):
    """The first pass takes shards as they become ready, whichever these are.

    So it depends on who was fast. Each choice is therefore written to `log` and brought to disk before it is used; one
    process `decides`, the others, and a run that goes on, read it there.
    """

    def __init__(self, dataset: Sharded, seed: int, log: Path, decides: bool, mixed: int | None = None):
        super().__init__(dataset, seed, mixed)
        self.log, self.decides = log, decides

    def _groups(self, epoch: int, stop: threading.Event) -> Iterator[tuple[list[int], bool]]:
        if epoch:
            yield from super()._groups(epoch, stop)
            return
        taken: set[int] = set()
        number = 0
        while len(taken) < self.dataset.shards:
            logged = self._logged()
            if number < len(logged):
                group = logged[number]
            elif self.decides:
                group = self._choose(taken, stop)
                self._append(group)
            else:
                if stop.wait(POLL_S):
                    raise Stopped
                continue
            taken |= set(group)
            number += 1
            yield group, len(taken) == self.dataset.shards

    def places(self, cursor: Cursor, stop: threading.Event) -> Iterator[Place]:
        epoch, index = cursor
        seen = sum(self.dataset.count(shard, stop) for group in self._logged() for shard in group)
        if not epoch and index > seen:
            raise ValueError(f"{self.log} tells of {seen} samples, the checkpoint of {index}: restore it")
        yield from super().places(cursor, stop)

    def _logged(self) -> list[list[int]]:
        """Groups so far; a line that was cut while it was written counts for nothing. ValueError for another log."""
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        if rows and rows[0] != (mine := {"data": self.dataset.identity, "seed": self.seed}):
            raise ValueError(f"{self.log} is of {rows[0]}, not of {mine}: choose another --out")
        return rows[1:]

    def _append(self, group: list[int]) -> None:
        """Bring a choice to disk, in the place of a line that was cut, if there is one."""
        self.log.touch()
        with self.log.open("rb+") as file:
            whole = file.read().rfind(b"\n") + 1
            head = [] if whole else [{"data": self.dataset.identity, "seed": self.seed}]
            file.seek(whole)
            file.truncate()
            file.write("".join(json.dumps(row) + "\n" for row in [*head, group]).encode())
            file.flush()
            os.fsync(file.fileno())
        fsync(self.log.parent)

    def _choose(self, taken: set[int], stop: threading.Event) -> list[int]:
        """Shards that are ready, at most `mixed`, at least one."""
        left = [shard for shard in range(self.dataset.shards) if shard not in taken]
        self.dataset.wait(left, stop)
        return [shard for shard in left if self.dataset.ready(shard)][: self.mixed]


class Mixture:
    """Draws from several orders in shares that go from `shares` to `last_shares` over `draws` samples, linearly.

    Each draw goes to the order that is owed most, so that shares hold in every batch, not only on average. Indices are
    those of `data_pipeline.dataset.MixedData`: source * SOURCE + index.
    """

    SOURCE = 1 << 56

    def __init__(self, orders: Sequence[Order], shares: Sequence[float], last_shares: Sequence[float], draws: int):
        if not len(orders) == len(shares) == len(last_shares):
            raise ValueError(f"{len(orders)} sources need as many shares, not {len(shares)} and {len(last_shares)}")
        if min(*shares, *last_shares) < 0 or not sum(shares) or not sum(last_shares):
            raise ValueError("shares are at least 0, and some are more")
        self.orders, self.draws = orders, draws
        self.shares, self.last_shares = (np.array(s, float) / sum(s) for s in (shares, last_shares))
        self.first = {"drawn": 0, "owed": [0.0] * len(orders), "cursors": [order.first for order in orders]}

    def describe(self) -> str:
        moving = f" to {self.last_shares.tolist()} in {self.draws}"
        shares = f"{self.shares.tolist()}{'' if (self.shares == self.last_shares).all() else moving}"
        return f"shares {shares} of {'; '.join(order.describe() for order in self.orders)}"

    def share(self, drawn: int) -> np.ndarray:
        """Shares of the sources after so many samples."""
        done = min(1.0, drawn / self.draws)
        return (1 - done) * self.shares + done * self.last_shares

    def places(self, cursor: Cursor, stop: threading.Event) -> Iterator[Place]:
        drawn, owed, cursors = cursor["drawn"], np.array(cursor["owed"]), list(cursor["cursors"])
        streams = [order.places(c, stop) for order, c in zip(self.orders, cursors, strict=True)]
        while True:
            owed = owed + self.share(drawn)
            source = int(owed.argmax())
            owed[source] -= 1
            index, epoch, cursors[source] = next(streams[source])
            drawn += 1
            after = {"drawn": drawn, "owed": owed.tolist(), "cursors": list(cursors)}
            yield source * self.SOURCE + index, epoch, after
