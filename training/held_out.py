"""The loss on samples that are never trained on, at draws that never change: what tells of a run before pictures do."""

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data_pipeline.loader import microbatches
from data_pipeline.sample import EncodedSample
from model.moving import moved
from training.flow_matching import VelocityMSE, per_sample_mean
from training.kinds import BANDS
from training.randomness import Randomness
from training.run_folder import RunFolder

if TYPE_CHECKING:
    from training.engine.step import Engine

DRAWS = 8
"""Noise levels, with their noise, that each held-out sample is measured at."""
DRAW_BY = Randomness(0)
"""What the draws are made by, whatever the run's seed."""

Measure = Callable[["Engine", list[Any]], tuple[Tensor, dict[str, Tensor]]]
"""Noise levels [n] of n items at DRAW_BY's draws for their epochs, and what the moving average does there: "loss" and
more, [n] each."""


class Items(Protocol):
    """What is held out: samples, or pairs of them, that have an epoch."""

    tokens: np.ndarray

    def __len__(self) -> int: ...
    def key(self, index: int) -> str: ...
    def __getitem__(self, index: int) -> Any: ...


class Part:
    """Some samples, or pairs, of a data set, as one of its own."""

    def __init__(self, whole: Any, places: np.ndarray):
        self._whole, self._places = whole, places
        self.tokens = whole.tokens[places]

    def __len__(self) -> int:
        return len(self._places)

    def key(self, index: int) -> str:
        return self._whole.key(self._places[index])

    def __getitem__(self, index: int) -> Any:
        return self._whole[self._places[index]]

    def column(self, name: str) -> np.ndarray:
        return self._whole.column(name)[self._places]

    def scores(self, name: str) -> np.ndarray:
        return self._whole.scores(name)[self._places]

    @property
    def score_names(self) -> list[str]:
        return self._whole.score_names

    def domains(self) -> tuple[tuple[str, ...], np.ndarray]:
        names, numbers = self._whole.domains()
        return names, numbers[self._places]

    @property
    def mixes_first(self) -> bool:
        return self._whole.mixes_first

    @property
    def shards(self) -> int:
        return self._whole.shards

    @property
    def identity(self) -> str:
        return f"{self._whole.identity}, {len(self)} of {len(self._whole)} samples"

    def ready(self, shard: int) -> bool:
        return self._whole.ready(shard)

    def wait(self, shards: Sequence[int], stop: threading.Event) -> None:
        self._whole.wait(shards, stop)

    def count(self, shard: int, stop: threading.Event | None = None) -> int:
        return len(self.rows(shard))

    def rows(self, shard: int, stop: threading.Event | None = None) -> np.ndarray:
        """Indices of the samples of a shard that are in this part."""
        whole = self._whole.rows(shard)
        ends = (whole[0], whole[-1] + 1) if len(whole) else (0, 0)
        return np.arange(*np.searchsorted(self._places, ends))


def hold_out(dataset: Any, count: int) -> tuple[Part, Part]:
    """(what is trained on, `count` samples that are not), of a data set that has `key_hashes`.

    The keys' hashes choose, so that the same samples are held out however they lie in shards. ValueError if nothing is
    left to train on.
    """
    if not 0 < count < len(dataset):
        raise ValueError(f"{count} of {len(dataset)} samples cannot be held out: take fewer, or none (0)")
    order = np.argsort(dataset.key_hashes(), kind="stable")
    return Part(dataset, np.sort(order[count:])), Part(dataset, np.sort(order[:count]))


def flow_loss(objective: VelocityMSE) -> Measure:
    """The loss of flow matching; `objective` should drop no conditions."""

    def measure(engine: "Engine", batch: list[EncodedSample]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, target = (moved(x, engine.device) for x in objective.prepare(batch, DRAW_BY, engine.align))
        losses = per_sample_mean((engine.frozen["ema"](inputs).float() - target) ** 2, inputs)
        return inputs.sigma, {"loss": losses}

    return measure


@dataclass
class HeldOutHook:
    """Logs what `measure` finds on `held` to held_out.jsonl: "loss", "loss/LOW-HIGH" of each of BANDS, and the rest."""

    every: int
    run: RunFolder
    measure: Measure
    held: Items
    max_tokens: int
    first: bool = False
    """Also before the first step."""
    names: tuple[str, ...] = ("loss",)
    """Of what `measure` finds."""

    def __post_init__(self) -> None:
        if (longest := max(map(int, self.held.tokens))) > self.max_tokens:
            raise ValueError(
                f"a held-out sample has {longest} tokens, a microbatch at most {self.max_tokens}: raise --max-tokens"
            )

    def __call__(self, engine: "Engine", step: int) -> None:
        sigma, found = self.measure_all(engine)
        if not self.run.writes:
            return
        read, losses = sigma.min(1) > 0, found["loss"]
        if not read.any():
            raise ValueError("not one of the held-out samples can be read")
        scores = {name: float(values[read].mean()) for name, values in found.items()}
        for low, high in zip(BANDS, BANDS[1:], strict=False):
            inside = (sigma > low) & (sigma <= high)
            if inside.any():
                scores[f"loss/{low:g}-{high:g}"] = float(losses[inside].mean())
        each = {name: values[read].mean(1).tolist() for name, values in found.items()}
        self.run.log_scores("held_out", step, scores, {"key": [self.held.key(i) for i in np.flatnonzero(read)], **each})

    @torch.no_grad()
    def measure_all(self, engine: "Engine") -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Noise levels and what was measured there, fp64 [items, DRAWS], on all ranks; data-parallel ranks measure some
        each. Zeros for an item that cannot be read."""
        samples = self._read(range(engine.dp_rank, len(self.held), engine.dp_size))
        mine = [(i, d) for i in samples for d in range(DRAWS)]
        costs = [int(self.held.tokens[i]) for i, _ in mine]
        found = torch.zeros(1 + len(self.names), len(self.held), DRAWS, dtype=torch.float64, device=engine.device)
        engine.frozen["ema"]  # gathered from all ranks, of which some may have nothing to measure
        for group in microbatches(costs, self.max_tokens) if mine else []:
            places = [mine[j] for j in sorted(group, key=costs.__getitem__)]
            sigma, measured = self.measure(engine, [replace(samples[i], epoch=d) for i, d in places])
            rows, draws = zip(*places, strict=True)
            found[:, rows, draws] = torch.stack([sigma, *(measured[name] for name in self.names)]).double()
        dist.all_reduce(found, group=engine.layout.dp_group)
        sigma, *values = found.cpu().numpy()
        return sigma, dict(zip(self.names, values, strict=True))

    def _read(self, indices: Sequence[int]) -> dict[int, Any]:
        """Items by index, without those that are broken, which are named."""
        found = {}
        for index in indices:
            try:
                found[index] = self.held[index]
            except ValueError as error:
                tqdm.write(f"not measured: {error}", sys.stderr)
        return found
