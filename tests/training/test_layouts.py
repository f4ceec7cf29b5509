"""The same run in every parallel layout: twenty steps of either optimizer, and a checkpoint that goes round them all.

Ranks' batches are unequal, in several microbatches; the gradient is clipped and an average follows.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from given_gradients import update
from mixed_batch import fill, samples, weight
from test_parallel_gradients import unequal_microbatches, whole
from worlds import run_world

from model.config import MMDiTConfig
from model.ops import fill_weight, local_shard, whole_shape

NARROW = MMDiTConfig(
    num_layers=2, num_attention_heads=4, attention_head_dim=8, joint_attention_dim=24, axes_dims_rope=(2, 2, 4),
    zero_cond_t=True,
)  # fmt: skip
ONE = {"one": (1, 1, False)}
OF_2 = {"dp2": (1, 1, False), "tp2 sp": (2, 1, True), "cp2": (1, 2, False)}
MORE_OF_2 = {"tp2": (2, 1, False)}
OF_4 = {"tp2 dp2": (2, 1, False), "tp2 sp dp2": (2, 1, True), "tp2 cp2": (2, 2, False), "cp2 dp2": (1, 2, False)}
STEPS = 20


def make_engine(layout: tuple[int, int, bool], muon_lr: float | None, **settings):
    from training.engine.config import EngineConfig, OptimizerConfig, ParallelConfig
    from training.engine.step import Engine

    optimizer = OptimizerConfig(lr=3e-3, muon_lr=muon_lr, eps=1e-4, weight_decay=0.1, clip=0.3, warmup_steps=3)
    config = EngineConfig(ParallelConfig(*layout), optimizer, ema_decay=0.9, **settings)
    engine = Engine(NARROW, config, total_steps=STEPS)
    fill(engine.model)
    engine.weights_changed()
    return engine


def step(engine) -> float:
    from training.flow_matching import VelocityMSE
    from training.randomness import Randomness

    epoch = engine.step_count
    metrics = engine.step(VelocityMSE(), unequal_microbatches(engine, samples(epoch)), Randomness(7))
    assert metrics["skipped"] == 0
    return metrics["loss"]


def weights(engine) -> dict[str, np.ndarray]:
    """Whole weights that train, and whole averages of them."""
    params = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
    found = {n: whole(p, p.detach(), engine).numpy().copy() for n, p in params.items()}
    averages = engine.shards.gather(engine.frozen.averages["ema"].average)
    return found | {f"ema.{n}": whole(params[n], a, engine).numpy().copy() for n, a in averages}


def trajectories(rank: int, layouts: dict, rates: tuple) -> dict:
    """{(layout, Muon's rate): (losses, weights)}"""
    found = {}
    for name, layout in layouts.items():
        for rate in rates:
            engine = make_engine(layout, rate)
            found[name, rate] = [step(engine) for _ in range(STEPS)], weights(engine)
    return found if rank == 0 else {}


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Largest relative distance of a tensor."""
    assert a.keys() == b.keys()
    return max(np.linalg.norm(a[n] - b[n]) / np.linalg.norm(b[n]) for n in b)


def require_the_same_run(*worlds: tuple[int, dict]) -> None:
    one = run_world(1, trajectories, ONE, (None, 0.02))[0]
    for size, layouts in worlds:
        shared = run_world(size, trajectories, layouts, (None, 0.02), deadline_s=600)[0]
        for (name, rate), (losses, found) in shared.items():
            expected_losses, expected = one["one", rate]
            assert losses == pytest.approx(expected_losses, rel=1e-5 if rate is None else 1e-4), (name, rate)
            assert distance(found, expected) <= (1e-5 if rate is None else 1e-3), (name, rate)


def test_twenty_steps_over_two_ranks():
    require_the_same_run((2, OF_2))


@pytest.mark.slow
def test_twenty_steps_in_more_layouts():
    require_the_same_run((2, MORE_OF_2), (4, OF_4))


def updates(rank: int, layouts: dict, **settings) -> dict[str, tuple[float, list[dict[str, np.ndarray]]]]:
    """{layout: (this rank's share of the work, what three updates by Muon do to its matrices)}, given gradients that
    are functions of (step, name)."""
    from training.engine.muon import is_matrix

    found = {}
    for layout_name, layout in layouts.items():
        engine, moved = make_engine(layout, 0.02, **settings), []
        params = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
        for at in range(3):
            for name, param in params.items():
                shape = whole_shape(engine.model, name)
                param.main_grad.copy_(local_shard(param, weight(f"{at} {name}", shape)))
                fill_weight(engine.model, name, torch.zeros(shape))
            engine.weights_changed()
            update(engine)
            moved.append({n: whole(p, p.detach(), engine).numpy().copy() for n, p in params.items() if is_matrix(n, p)})
        exchange = engine.optimizer.optimizer.muon.exchange
        work = {name: o * i * min(o, i) for name, (o, i) in exchange.shapes.items()}
        found[layout_name] = sum(work[name] for name in exchange.mine) / sum(work.values()), moved
    return found


def test_equal_gradients_make_equal_updates_for_which_ranks_share_the_work():
    _, one = run_world(1, updates, ONE)[0]["one"]
    for size, layouts in ((2, OF_2 | MORE_OF_2), (4, {"tp2 dp2": (2, 1, False)})):
        ranks = run_world(size, updates, layouts)
        for name in layouts:
            shares, found = zip(*(rank[name] for rank in ranks), strict=True)
            assert sum(shares) == pytest.approx(1) and max(shares) <= 1.2 / size, (name, shares)
            for mine, expected in zip(found[0], one, strict=True):
                assert distance(mine, expected) <= 1e-5, name


def updates_of_adapters(rank: int, layouts: dict) -> dict:
    return updates(rank, layouts, lora_rank=4, lora_targets=("q", "out", "mlp_in", "mlp_out"))


def test_equal_gradients_make_equal_updates_of_adapters():
    _, one = run_world(1, updates_of_adapters, ONE)[0]["one"]
    _, shared = run_world(2, updates_of_adapters, MORE_OF_2)[0]["tp2"]
    for mine, expected in zip(shared, one, strict=True):
        assert len(mine) > 10 and distance(mine, expected) <= 1e-5


def go_on(rank: int, folder: Path, layouts: dict, steps: int, muon_lr: float | None) -> list[float]:
    """Losses of some steps in each of the layouts, with a checkpoint between any two."""
    losses = []
    for layout in layouts.values():
        engine = make_engine(layout, muon_lr)
        engine.resume(folder)
        losses += [step(engine) for _ in range(steps)]
        engine.save_step(folder, {}, keep=1)
    return losses


def require_the_ring(folder: Path, muon_lr: float | None, *worlds: tuple[int, dict]) -> None:
    around = [run_world(size, go_on, folder / "ring", layouts, 2, muon_lr)[0] for size, layouts in worlds]
    losses = [loss for some in around for loss in some]
    assert losses == pytest.approx(run_world(1, go_on, folder / "one", ONE, len(losses), muon_lr)[0], rel=1e-5)


def test_a_checkpoint_goes_round(tmp_path: Path):
    require_the_ring(tmp_path, 0.02, (2, OF_2), (1, ONE))


@pytest.mark.slow
@pytest.mark.parametrize("muon_lr", [None, 0.02], ids=["adamw", "muon"])
def test_a_checkpoint_goes_round_more_layouts(tmp_path: Path, muon_lr: float | None):
    require_the_ring(tmp_path, muon_lr, (1, ONE), (2, MORE_OF_2 | OF_2), (4, OF_4), (1, ONE))
