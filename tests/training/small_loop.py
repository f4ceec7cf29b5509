"""The loop on the mixed batch: a run of 14 steps that takes seconds."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from mixed_batch import CONFIG, fill, samples

from training.engine.checkpoint import read_weights
from training.flow_matching import VelocityMSE
from training.loop import LoopConfig


@dataclass
class Cycle:
    """The mixed batch for ever (or `length` steps), epoch after epoch; a cursor like a loader's."""

    dp_rank: int = 0
    dp_size: int = 1
    length: int = 10**9
    epoch: int = 0

    def __iter__(self):
        return self

    def __next__(self) -> list:
        if self.epoch == self.length:
            raise StopIteration
        self.epoch += 1
        mine = samples(self.epoch)[self.dp_rank :: self.dp_size]
        return [mine[:1], mine[1:]]

    def state_dict(self) -> dict:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict) -> None:
        self.epoch = state["epoch"]


@dataclass
class At:
    """A hook that calls `action` at some steps."""

    action: object
    steps: tuple[int, ...]
    every: int = 1
    seen: list[int] = field(default_factory=list)

    def __call__(self, engine, step: int) -> None:
        self.seen.append(step)
        if step in self.steps:
            self.action()


def train(folder: Path, config: LoopConfig, batches=None, hooks=(), objective=None, **settings) -> float:
    """Run the loop in this process; returns the number of skipped steps."""
    from training.engine.config import EngineConfig, OptimizerConfig
    from training.engine.step import Engine
    from training.loop import train
    from training.run_folder import RunFolder

    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=3, schedule="cosine")
    engine = Engine(CONFIG, EngineConfig(optimizer=optimizer, ema_decay=0.9, **settings), config.steps)
    fill(engine.model)
    engine.weights_changed()
    batches = batches or Cycle(engine.dp_rank, engine.dp_size)
    train(engine, objective or VelocityMSE(), batches, config, RunFolder(folder, config, engine.rank == 0), hooks)
    return engine.skipped


def run_loop(rank: int, folder: Path, config: LoopConfig, *args) -> float:
    return train(folder, config, *args)


CONFIGURATION = LoopConfig(steps=14, save_every=3, keep=2, seed=3)


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    for ema in (True, False):
        x, y = read_weights(a, ema)[1], read_weights(b, ema)[1]
        assert x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


def count_rows(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0
