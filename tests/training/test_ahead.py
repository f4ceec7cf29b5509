"""Microbatches that a thread prepares beforehand are those that would be prepared in their turn."""

import threading
from pathlib import Path

import numpy as np
import pytest
from mixed_batch import CONFIG, fill, samples
from worlds import run_world

from data_pipeline.loader import Loader
from training.ahead import one_ahead
from training.flow_matching import VelocityMSE
from training.loop import LoopConfig


def test_results_come_in_order_and_one_ahead():
    made: list[int] = []
    caller = threading.current_thread()

    def double(x: int) -> int:
        assert threading.current_thread() is not caller
        made.append(x)
        return 2 * x

    results = one_ahead(double, range(5))
    assert next(results) == 0 and set(made) <= {0, 1}
    assert list(results) == [2, 4, 6, 8] and made == [0, 1, 2, 3, 4]
    assert list(one_ahead(double, [])) == []


def test_an_error_comes_in_its_place():
    results = one_ahead(lambda x: 1 // x, [1, 0, 1])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


class Ten:
    """A data set of ten samples."""

    def __init__(self):
        self._samples = [s for i in range(3) for s in samples(i)][:10]
        self.tokens = np.array([len(s.txt) + s.latent[0].numel() // 4 for s in self._samples])

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, index: int) -> str:
        return f"{index}"

    def __getitem__(self, index: int):
        return self._samples[index]


class Watched(VelocityMSE):
    """Notes which threads prepare."""

    threads: set[str]

    def prepare(self, batch, rng, align):
        self.threads.add(threading.current_thread().name)
        return super().prepare(batch, rng, align)


def trained(folder: Path, ahead: bool, by_loader: bool, lengths: tuple[int, ...]) -> tuple[str, set[str]]:
    """(rows of the log, threads that prepared) of a run that is stopped and goes on after each of `lengths`."""
    from training.engine.config import EngineConfig, OptimizerConfig
    from training.engine.step import Engine
    from training.loop import train
    from training.run_folder import RunFolder

    algorithm = Watched()
    algorithm.threads = set()
    for steps in lengths:
        config = LoopConfig(steps=steps, save_every=9, seed=5)
        engine = Engine(CONFIG, EngineConfig(optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2)), 5)
        engine.runs_ahead = ahead
        fill(engine.model)
        engine.weights_changed()
        loader = Loader(Ten(), 4, max_tokens=60)
        train(engine, algorithm, loader if by_loader else Plain(loader), config, RunFolder(folder, config, True))
        loader.close()
    return (folder / "metrics.jsonl").read_text(), algorithm.threads


class Plain:
    """A loader's batches without its thread."""

    def __init__(self, loader: Loader):
        self._loader = loader
        self.state_dict, self.load_state_dict = loader.state_dict, loader.load_state_dict

    def __next__(self) -> list:
        return next(self._loader)


RUNS = [(False, True, (5,)), (True, True, (5,)), (True, False, (5,)), (True, True, (2, 5))]


def all_trained(rank: int, folder: Path) -> list:
    return [trained(folder / f"{i}", *run) for i, run in enumerate(RUNS)]


def test_running_ahead_changes_no_bit_of_a_run_nor_of_one_that_was_stopped(tmp_path: Path):
    [runs] = run_world(1, all_trained, tmp_path)
    logs = {log for log, _ in runs}
    assert len(logs) == 1 and len(logs.pop().splitlines()) == 5
    assert [threads for _, threads in runs] == [{"MainThread"}, {"loader"}, {"ahead_0"}, {"loader"}]
