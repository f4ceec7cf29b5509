"""The order of a curriculum: classes of samples in shares that move, of those alone that reach least scores that move.

What may be drawn is looked up once, in the index of the data; a step then costs a few additions a sample. As every
order (`data_pipeline.order`) it is a function of the seed, the data and a cursor in JSON.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from command_line import UserError
from data_pipeline.classes import SOURCE, TEXT
from data_pipeline.draws import Curve, Draws, height
from data_pipeline.order import MIXED_SHARDS, ByShard, Cursor, Mixture, Place

ROUNDS, NEAR = 2000, 1e-3
"""Rounds of raking at most, and how far a share may be from what was asked for after them."""


class ClassSamples:
    """The samples of one class, in pieces that an order takes as shards."""

    mixes_first = True

    def __init__(self, rows: np.ndarray, piece: int):
        self._rows, self._piece = rows, piece
        self.shards = -(-len(rows) // piece)

    def count(self, shard: int, stop: threading.Event | None = None) -> int:
        return len(self.rows(shard))

    def rows(self, shard: int, stop: threading.Event | None = None) -> np.ndarray:
        return self._rows[shard * self._piece : (shard + 1) * self._piece]

    def ready(self, shard: int) -> bool:
        return True

    def wait(self, shards: Sequence[int], stop: threading.Event) -> None:
        pass


class Classes:
    """The classes of one data set that `draws` tells apart, and the share of each over the stage.

    Shares of the text and of the source or domain are asked for apart; those of the classes, (text, source), are the
    ones that have these sums and else are as near as can be to what the data hold (raking; Deming and Stephan, 1940).
    `where` names the data in UserErrors: for a share that no sample can have, and for scores that nobody gave.
    """

    def __init__(self, dataset: Any, draws: Draws, where: str):
        self.dataset, self.draws, self.where = dataset, draws, where
        self.fractions = draws.fractions()
        self._least = {name: (self._scores(name), points) for name, points in draws.minimum.items()}
        kind = dataset.column("kind").astype(np.int16)
        texts, text = (TEXT, kind % len(TEXT)) if draws.text else (("",), 0 * kind)
        origins, origin = self._origins(kind // len(TEXT))
        place = text * len(origins) + origin
        self.names = [(t, o) for t, o in product(texts, origins)]
        """Of each class: kind of text and origin, "" where they are not told apart."""
        passing = np.stack([self._passing(fraction) for fraction in self.fractions])
        beside = np.pad(passing, ((1, 1), (0, 0)), constant_values=True)
        passing &= beside[:-2] & beside[2:]  # so what a class has at a bend it has up to the next one
        counts = np.stack([np.bincount(place[p], minlength=len(self.names)) for p in passing])
        counts = counts.reshape(len(self.fractions), len(texts), len(origins)).astype(float)
        shares = np.stack([self._raked(i, counts[i], texts, origins) for i in range(len(counts))])
        self.shares = shares.reshape(len(self.fractions), -1)
        """[bends, classes]"""
        piece = max(1, len(dataset) // dataset.shards)
        by_class = np.argsort(place, kind="stable")
        ends = np.searchsorted(place[by_class], np.arange(len(self.names) + 1))
        rows = [by_class[a:b].astype(np.uint32) for a, b in zip(ends, ends[1:], strict=False)]
        self.drawn = [i for i in range(len(self.names)) if self.shares[:, i].any()]
        """Classes that have a share at some time."""
        self.samples = [ClassSamples(rows[i], piece) for i in self.drawn]
        self.shares = self.shares[:, self.drawn]
        self.sizes = [len(rows[i]) for i in self.drawn]

    def share(self, fraction: float) -> np.ndarray:
        """Share of each class that is drawn, after this part of the stage."""
        at = min(max(bisect_right(self.fractions, fraction), 1), len(self.fractions) - 1)
        a, b = self.fractions[at - 1 : at + 1]
        done = (fraction - a) / (b - a)
        return (1 - done) * self.shares[at - 1] + done * self.shares[at]

    def passes(self, index: int, fraction: float) -> bool:
        """Whether a sample reaches the least scores of this moment."""
        return not any(float(scores[index]) < height(points, fraction) for scores, points in self._least.values())

    def _passing(self, fraction: float) -> np.ndarray:
        found = np.ones(len(self.dataset), bool)
        for scores, points in self._least.values():
            found &= ~np.less(scores, height(points, fraction), signature="dd->?")
        return found

    def _scores(self, name: str) -> np.ndarray:
        if name not in (known := self.dataset.score_names):
            has = f"there are {', '.join(known)}" if known else "there are none"
            raise UserError(
                f"draws.minimum.{name}: no sample of {self.where} has that score ({has}); curate the data, "
                "change the draws of the recipe, or draw --natural"
            )
        return self.dataset.scores(name)

    def _origins(self, drawn: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
        """Names of origins, synthetic the last, and which one each sample has; `drawn` is 1 for synthetic ones."""
        if not self.draws.domain:
            return (SOURCE, drawn) if self.draws.source else (("",), 0 * drawn)
        names, numbers = self.dataset.domains()
        names += tuple(name for name in self.draws.domain if name not in names)
        return (*names, "synthetic"), np.where(drawn, len(names), numbers.astype(np.int16))

    def _wanted(self, fraction: float, counts: np.ndarray, origins: Sequence[str]) -> np.ndarray | None:
        """Share of each origin; None if it is left as it is."""
        draws = self.draws
        if not draws.source and not draws.domain:
            return None
        drawn = counts[:, -1].sum() / max(1.0, counts.sum())
        if draws.source:
            parts = {name: height(points, fraction) for name, points in draws.source.items()}
            drawn = parts.get("synthetic", 0.0) / sum(parts.values())
        if not draws.domain:
            return np.array([1 - drawn, drawn])
        parts = {name: height(points, fraction) for name, points in draws.domain.items()}
        real = [(1 - drawn) * parts.get(name, 0.0) / sum(parts.values()) for name in origins[:-1]]
        return np.array([*real, drawn])

    def _raked(self, bend: int, counts: np.ndarray, texts: Sequence[str], origins: Sequence[str]) -> np.ndarray:
        """Shares [texts, origins] at a bend, of samples of these numbers."""
        fraction, rows = self.fractions[bend], None
        if self.draws.text:
            rows = np.array([height(self.draws.text.get(name, ((0.0, 0.0),)), fraction) for name in texts])
            rows = rows / rows.sum()
        columns = self._wanted(fraction, counts, origins)
        asked = [(w, axis, names) for w, axis, names in ((rows, 1, texts), (columns, 0, origins)) if w is not None]
        for wanted, axis, names in asked:
            for name, share, number in zip(names, wanted, counts.sum(axis), strict=True):
                if share and not number:
                    raise UserError(self._lacking(name, share, fraction))
        if not counts.sum():
            raise UserError(self._lacking("", 1.0, fraction))
        shares = counts / counts.sum()
        for _ in range(ROUNDS):
            for wanted, axis, _ in asked:
                there = shares.sum(axis, keepdims=True)
                shares = shares * np.divide(wanted.reshape(there.shape), there, out=0 * there, where=there > 0)
            if all(abs(shares.sum(axis) - wanted).max() < NEAR / 100 for wanted, axis, _ in asked):
                break
        for wanted, axis, names in asked:
            there = shares.sum(axis)
            worst = int(abs(there - wanted).argmax())
            if abs(there - wanted)[worst] > NEAR:
                raise UserError(
                    f"the shares of text and of source or domain cannot both hold {self._moment(fraction)}: "
                    f"{names[worst]} should be {wanted[worst]:.1%} of what is drawn and comes to {there[worst]:.1%}, "
                    f"as {self.where} has no samples that are both; change the draws of the recipe"
                )
        return shares / shares.sum()

    def _moment(self, fraction: float) -> str:
        return f"at {fraction:.0%} of the stage"

    def _lacking(self, name: str, share: float, fraction: float) -> str:
        least = " and ".join(f"{f} of at least {height(p, fraction):g}" for f, p in self.draws.minimum.items())
        passing = f" with {least} there and up to the next points of the curves" if least else ""
        what = f"{name} has a share of {share:.1%}" if name else "samples are drawn"
        return (
            f"{what} {self._moment(fraction)}, but {self.where} holds no such sample{passing}: "
            "change the draws of the recipe, add data, or draw --natural"
        )

    def lines(self) -> list[str]:
        """What is drawn, to be read."""
        lines = []
        for place, number in enumerate(self.drawn):
            name = " ".join(filter(None, self.names[number])) or "all"
            first, last = self.shares[0, place], self.shares[-1, place]
            moves = "" if np.ptp(self.shares[:, place]) < NEAR else f" to {last:.1%}"
            lines.append(f"{name}: {self.sizes[place]:,} samples, {first:.1%}{moves} of what is drawn")
        left = len(self.dataset) - sum(self.sizes)
        if left:
            lines.append(f"{left:,} samples of other classes are not drawn")
        for name, (scores, points) in self._least.items():
            lines.append(f"{name}: at least {points[0][1]:g}, in the end {points[-1][1]:g}")
            if unscored := int(np.isnan(scores).sum()):
                lines[-1] += f"; {unscored:,} samples have no such score and pass"
        return lines


class ByClass:
    """Draws from data sets in shares of compute, and of each from its classes in shares of samples.

    Each draw goes to the data set that is owed most compute, by `cost(data set, index)` of what it has drawn, and
    there to the class that is owed most samples. `length` is that of the stage in samples; with `tokens(data set,
    index)`, in tokens. Indices are those of `Mixture`, where there are several data sets.
    """

    def __init__(
        self,
        parts: Sequence[Classes],
        seed: int,
        length: float,
        shares: Sequence[Curve] = (((0.0, 1.0),),),
        cost: Callable[[int, int], float] = lambda part, index: 1.0,
        tokens: Callable[[int, int], int] | None = None,
    ):
        self.parts, self.length, self.shares, self.cost, self.tokens = parts, length, shares, cost, tokens
        self.orders = [[ByShard(samples, seed, MIXED_SHARDS) for samples in part.samples] for part in parts]
        self.first = {"done": 0, "owed": [0.0] * len(parts), "parts": [self._begin(orders) for orders in self.orders]}

    @staticmethod
    def _begin(orders: Sequence[ByShard]) -> Cursor:
        return {"owed": [0.0] * len(orders), "cursors": [order.first for order in orders]}

    def describe(self) -> str:
        draws = self.parts[0].draws
        length = f" over {self.length:,.0f} {'tokens' if self.tokens else 'samples'}" if draws.moves else ""
        return f"{draws}{length}; {self.orders[0][0].describe()}"

    def share(self, fraction: float) -> np.ndarray:
        """Share of compute of each data set."""
        shares = np.array([height(points, fraction) for points in self.shares])
        return shares / shares.sum()

    def places(self, cursor: Cursor, stop: threading.Event) -> Iterator[Place]:
        done, owed = cursor["done"], np.array(cursor["owed"])
        states = [{"owed": np.array(p["owed"]), "cursors": list(p["cursors"])} for p in cursor["parts"]]
        streams = [
            [order.places(c, stop) for order, c in zip(orders, state["cursors"], strict=True)]
            for orders, state in zip(self.orders, states, strict=True)
        ]
        after = list(cursor["parts"])
        while True:
            fraction = min(1.0, done / self.length)
            shares = self.share(fraction)
            part = int(np.where(shares > 0, owed, -np.inf).argmax())
            index, epoch = self._draw(self.parts[part], states[part], streams[part], fraction)
            cost = self.cost(part, index)
            owed = owed + shares * cost
            owed[part] -= cost
            done += 1 if self.tokens is None else self.tokens(part, index)
            after[part] = {"owed": states[part]["owed"].tolist(), "cursors": list(states[part]["cursors"])}
            yield part * Mixture.SOURCE + index, epoch, {"done": done, "owed": owed.tolist(), "parts": list(after)}

    def _draw(self, classes: Classes, state: dict, streams: list[Iterator[Place]], fraction: float) -> tuple[int, int]:
        """The next sample of the class that is owed most, in `state`, and its epoch."""
        shares = classes.share(fraction)
        state["owed"] += shares
        number = int(np.where(shares > 0, state["owed"], -np.inf).argmax())
        state["owed"][number] -= 1
        while True:
            index, epoch, state["cursors"][number] = next(streams[number])
            if classes.passes(index, fraction):
                return index, epoch
