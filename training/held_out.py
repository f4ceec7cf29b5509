"""The loss on samples that are never trained on, at draws that never change: what tells of a run before pictures do."""

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.loader import EncodedDataset, microbatches
from data_pipeline.sample import EncodedSample
from training.engine.step import moved
from training.flow_matching import VelocityMSE, per_sample_mean
from training.randomness import Randomness
from training.run_folder import RunFolder

if TYPE_CHECKING:
    from training.engine.step import Engine

DRAWS = 8
"""Noise levels, with their noise, that each held-out sample is measured at."""
BANDS = (0.0, 0.3, 0.6, 0.8, 0.9, 1.0)
"""Ends of the bands of noise levels that are averaged apart."""


class Part:
    """Some samples of a data set, as one of its own."""

    def __init__(self, whole: EncodedDataset, places: np.ndarray):
        self._whole, self._places = whole, places
        self.tokens = whole.tokens[places]

    def __len__(self) -> int:
        return len(self._places)

    def key(self, index: int) -> str:
        return self._whole.key(self._places[index])

    def __getitem__(self, index: int) -> EncodedSample:
        return self._whole[self._places[index]]


def hold_out(dataset: EncodedDataset, count: int) -> tuple[Part, Part]:
    """(what is trained on, `count` samples that are not).

    The keys' hashes choose, so that the same samples are held out however they lie in shards. ValueError if nothing is
    left to train on.
    """
    if not 0 < count < len(dataset):
        raise ValueError(f"{count} of {len(dataset)} samples cannot be held out: take fewer, or none (0)")
    hashes = [hashlib.blake2b(dataset.key(i).encode(), digest_size=8).digest() for i in range(len(dataset))]
    order = np.array(sorted(range(len(dataset)), key=hashes.__getitem__))
    return Part(dataset, np.sort(order[count:])), Part(dataset, np.sort(order[:count]))


@dataclass
class HeldOutHook:
    """Logs the moving average's loss on `held` to held_out.jsonl: "loss", and "loss/LOW-HIGH" of each of BANDS."""

    every: int
    run: RunFolder
    objective: VelocityMSE
    """Without dropout of conditions."""
    held: Part
    max_tokens: int
    first: bool = False
    """Also before the first step."""

    def __call__(self, engine: "Engine", step: int) -> None:
        sigma, losses = (x.cpu().numpy() for x in self.measure(engine))
        if not self.run.writes:
            return
        scores = {"loss": float(losses.mean())}
        for low, high in zip(BANDS, BANDS[1:], strict=False):
            inside = (sigma > low) & (sigma <= high)
            if inside.any():
                scores[f"loss/{low:g}-{high:g}"] = float(losses[inside].mean())
        each = {"key": [self.held.key(i) for i in range(len(self.held))], "loss": losses.mean(1).tolist()}
        self.run.log_scores("held_out", step, scores, each)

    @torch.no_grad()
    def measure(self, engine: "Engine") -> tuple[torch.Tensor, torch.Tensor]:
        """Noise levels and losses, fp64 [samples, DRAWS], on all ranks; data-parallel ranks measure some each."""
        model, rng = engine.frozen["ema"], Randomness(0)
        found = torch.zeros(2, len(self.held), DRAWS, dtype=torch.float64, device=engine.device)
        mine = [(i, d) for i in range(engine.dp_rank, len(self.held), engine.dp_size) for d in range(DRAWS)]
        costs = [int(self.held.tokens[i]) for i, _ in mine]
        for group in microbatches(costs, self.max_tokens) if mine else []:
            places = [mine[j] for j in sorted(group, key=costs.__getitem__)]
            batch = [replace(self.held[i], epoch=d) for i, d in places]
            inputs, target = (moved(x, engine.device) for x in self.objective.prepare(batch, rng, engine.align))
            losses = per_sample_mean((model(inputs).float() - target) ** 2, inputs)
            rows, draws = zip(*places, strict=True)
            found[0, rows, draws], found[1, rows, draws] = inputs.sigma.double(), losses.double()
        dist.all_reduce(found, group=engine.layout.dp_group)
        return found[0], found[1]
