"""The loop and the engine's steps: kills, signals, losses that are not finite, ends of data."""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mixed_batch import CONFIG, fill, samples
from small_loop import CONFIGURATION, At, Cycle, assert_same_run, count_rows, run_loop, train
from worlds import run_world, start

from model.packing import ModelInputs
from training.engine.checkpoint import list_checkpoints, read_weights
from training.engine.device import peak_memory
from training.flow_matching import VelocityMSE
from training.loop import LoopConfig, speed_of
from training.run_folder import read_metrics
from training.seeds import train_seeds
from training.start import RunConfig


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_world(1, run_loop, folder, CONFIGURATION)
    return folder


def test_a_run_killed_again_and_again_equals_one_that_was_not(undisturbed: Path, tmp_path: Path):
    rng = random.Random(0)
    for rows in (2, 5, 8, 11):  # killed soon after so many steps: in a step, in a save, between the two
        process, _ = start(run_loop, 0, tmp_path, CONFIGURATION)
        while process.is_alive() and count_rows(tmp_path) < rows:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        assert process.is_alive()
        process.kill()
        process.join()
    run_world(1, run_loop, tmp_path, CONFIGURATION)
    assert_same_run(undisturbed, tmp_path)


def interrupted_loop(rank: int, folder: Path, number: int, at: int) -> str:
    def twice() -> None:  # as Ctrl-C under torchrun
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    try:
        train(folder, CONFIGURATION, hooks=[At(twice, (at,))])
    except KeyboardInterrupt:
        return "interrupted"
    return "finished"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(undisturbed: Path, tmp_path: Path, number: int):
    assert run_world(1, interrupted_loop, tmp_path, number, 6) == ["interrupted"]
    assert list_checkpoints(tmp_path / "checkpoints")[0].name == "step_00000006"
    assert count_rows(tmp_path) == 6
    run_world(1, run_loop, tmp_path, CONFIGURATION)
    assert_same_run(undisturbed, tmp_path)


def signalled_at_the_end(rank: int, folder: Path) -> bool:
    import training.loop

    told, whole = [], training.loop.train
    training.loop.train = lambda *a: told.append(whole(*a))
    train(folder, CONFIGURATION, hooks=[At(lambda: os.kill(os.getpid(), signal.SIGTERM), (CONFIGURATION.steps,))])
    return told[0]


def test_a_signal_in_the_last_step_is_told(undisturbed: Path, tmp_path: Path):
    assert run_world(1, signalled_at_the_end, tmp_path) == [True]
    assert_same_run(undisturbed, tmp_path)


def test_and_no_other_seed_is_begun(tmp_path: Path):
    begun = []
    with pytest.raises(KeyboardInterrupt):
        train_seeds(RunConfig(out=tmp_path, seeds=3), lambda one: begun.append(one.out) or True)
    assert begun == [tmp_path / "seed-0"]


@dataclass
class Triples(Cycle):
    """Whose cursor holds after every third batch only."""

    @property
    def resumable(self) -> bool:
        return self.epoch % 3 == 0


def interrupted_triples(rank: int, folder: Path) -> str:
    try:
        train(folder, CONFIGURATION, Triples(), hooks=[At(lambda: os.kill(os.getpid(), signal.SIGTERM), (4,))])
    except KeyboardInterrupt:
        return "interrupted"
    return "finished"


def test_a_signal_waits_for_a_step_that_can_be_gone_on_from(tmp_path: Path):
    assert run_world(1, interrupted_triples, tmp_path) == ["interrupted"]
    assert list_checkpoints(tmp_path / "checkpoints")[0].name == "step_00000006"


def loop_with_hook(rank: int, folder: Path, config: LoopConfig) -> list[int]:
    hook = At(None, (), every=3)
    train(folder, config, hooks=[hook])
    return hook.seen


def test_hooks_checkpoints_and_a_finished_run(tmp_path: Path):
    config = replace(CONFIGURATION, steps=7, save_every=2, keep=3)
    assert run_world(1, loop_with_hook, tmp_path, config) == [[3, 6, 7]]
    names = [p.name for p in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step_00000007", "step_00000006", "step_00000004"]
    assert run_world(1, loop_with_hook, tmp_path, config) == [[]]  # nothing is left to do
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert [round(row["lr"], 6) for row in rows[:3]] == [0.003333, 0.006667, 0.01]
    assert {row["samples"] for row in rows} == {4.0} and {row["skipped"] for row in rows} == {0.0}


def test_the_loop_ends_with_its_batches(tmp_path: Path):
    run_world(1, run_loop, tmp_path, CONFIGURATION, Cycle(length=5))
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step_00000005", "step_00000003"]
    assert count_rows(tmp_path) == 5


@dataclass
class Poisoned(VelocityMSE):
    """The loss, or a gradient, of one sample of one epoch is not finite."""

    epoch: int = 2
    key: str = "sample-3"
    where: str = "loss"

    def prepare(self, batch, rng, align):
        inputs, target = super().prepare(batch, rng, align)
        return inputs, (target, any(s.key == self.key and s.epoch == self.epoch for s in batch))

    def loss(self, model, frozen, inputs: ModelInputs, aux):
        target, poisoned = aux

        def bad(inputs):
            output = model(inputs)
            if poisoned and self.where == "loss":
                return output * torch.nan
            if poisoned:
                output.register_hook(lambda grad: grad * torch.inf)
            return output

        return super().loss(bad, frozen, inputs, target)


def poisoned_steps(rank: int, where: str) -> tuple:
    """Steps 1, 2 (poisoned), 3; and then the same without the second step ever having come."""
    from training.engine.config import EngineConfig, OptimizerConfig
    from training.engine.step import Engine
    from training.randomness import Randomness

    results = []
    for epochs in ((1, 2, 3), (1, 3)):
        engine = Engine(CONFIG, EngineConfig(optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0), ema_decay=0.9))
        fill(engine.model)
        engine.weights_changed()
        for epoch in epochs:
            before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
            batch = [samples(epoch)[engine.dp_rank :: engine.dp_size]]
            metrics = engine.step(Poisoned(where=where), batch, Randomness(0))
            changed = any(not torch.equal(before[n], p) for n, p in engine.model.named_parameters())
            assert changed == (epoch != 2)
        averages = {n: w.clone() for n, w in engine.shards.gather(engine.frozen.averages["ema"].average)}
        weights = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
        results.append((metrics["skipped"], weights, averages))
    (skipped, *with_poison), (none, *without) = results
    same = [all(torch.equal(a[n], b[n]) for n in a) for a, b in zip(with_poison, without, strict=True)]
    return skipped, none, same


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(where: str):
    assert run_world(2, poisoned_steps, where) == [(1.0, 0.0, [True, True])] * 2


def poisoned_loop(rank: int, folder: Path) -> float:
    return train(folder, replace(CONFIGURATION, steps=3), objective=Poisoned())


def test_metrics_stay_json_when_the_loss_does_not(tmp_path: Path):
    assert run_world(1, poisoned_loop, tmp_path) == [1]
    rows = [
        json.loads(row, parse_constant=pytest.fail) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["loss"] is None for row in rows] == [False, True, False]
    assert [row["skipped"] for row in rows] == [0.0, 1.0, 1.0]


def bf16_loop(rank: int, folder: Path, steps: int) -> list:
    """Losses of a run in bfloat16 and of the same in fp32."""
    config = replace(CONFIGURATION, steps=steps)
    for dtype in ("bfloat16", "float32"):
        train(folder / dtype, config, dtype=dtype)
    return [[row["loss"] for row in read_metrics(folder / dtype)] for dtype in ("bfloat16", "float32")]


def test_bfloat16_keeps_fp32_masters_and_resumes_bit_for_bit(tmp_path: Path):
    [(low, full)] = run_world(1, bf16_loop, tmp_path / "a", 8)
    assert low != full and low == pytest.approx(full, rel=0.02)
    weights, average = (read_weights(tmp_path / "a" / "bfloat16", ema)[1] for ema in (False, True))
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert average["img_in.weight"].dtype == torch.float32
    checkpoints = list_checkpoints(tmp_path / "a" / "bfloat16" / "checkpoints")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "bfloat16" / "checkpoints" / checkpoints[0].name)
    run_world(1, bf16_loop, tmp_path / "b", 8)
    assert_same_run(tmp_path / "a" / "bfloat16", tmp_path / "b" / "bfloat16")


def test_rows_of_another_run_are_refused(tmp_path: Path):
    run_world(1, run_loop, tmp_path, replace(CONFIGURATION, steps=4))
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(rows[1:]))
    with pytest.raises(AssertionError, match="does not hold one row for each of 4 steps"):
        run_world(1, run_loop, tmp_path, CONFIGURATION)


def test_speed_is_counted_work_over_seconds():
    metrics = {"samples": 8.0, "tokens": 100.0, "flops": 6e9}
    batches = SimpleNamespace(depth=2, passed_over=1, buckets={"8x8": 3})
    speed = speed_of(batches, metrics, waited=0.5, seconds=2.0, peak_flops=1e10)
    rates = {"samples_per_second": 4.0, "tokens_per_second": 50.0, "flops_per_second": 3e9, "mfu": 0.3}
    others = {"seconds": 2.0, "data_wait": 0.25, "queue_depth": 2, "passed_over": 1, "samples_per_second/8x8": 1.5}
    assert speed == pytest.approx(rates | others)
    assert "mfu" not in speed_of(batches, metrics | {"flops": 0.0}, 0.5, 2.0, 1e10)  # not counted, as of a VAE
    assert "data_wait" not in speed_of(object(), metrics, 0.5, 2.0)


def test_memory_is_what_the_process_has():
    before = peak_memory(torch.device("cpu"))
    kept = torch.ones(1 << 26)
    taken = peak_memory(torch.device("cpu")) - before
    assert taken == pytest.approx(4 * kept.numel(), rel=0.1)
