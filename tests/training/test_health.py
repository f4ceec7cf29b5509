"""What a step tells of itself: losses by kind, norms by group, work; the same in every layout and after a resume."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from mixed_batch import CONFIG, fill, samples
from worlds import run_world

from model.mmdit import MMDiT
from training.cost.step import Setting, Work, flops
from training.engine.config import EngineConfig
from training.flow_matching import VelocityMSE, per_sample_mean
from training.kinds import BANDS
from training.randomness import Randomness

OBJECTIVE = VelocityMSE(condition_dropout=0.0)
SOURCES = ("shapes", "photo", "text", "shapes")


def batch(epoch: int) -> list:
    """The mixed batch, each sample with a source; the third kind comes with the second step."""
    named = zip(samples(epoch), SOURCES, strict=True)
    return [dataclasses.replace(s, meta={"source": n if epoch or n != "text" else "photo"}) for s, n in named]


def make_engine(layout: tuple[int, int, bool]):
    from training.engine.config import OptimizerConfig, ParallelConfig
    from training.engine.step import Engine

    optimizer = OptimizerConfig(lr=1e-2, eps=1e-4, warmup_steps=0, clip=0.5)
    engine = Engine(CONFIG, EngineConfig(ParallelConfig(*layout), optimizer), total_steps=9)
    fill(engine.model)
    engine.weights_changed()
    return engine


def two_steps(rank: int, layout: tuple[int, int, bool], folder: Path | None = None) -> list[dict[str, float]]:
    """Metrics of two steps; with a folder, the second by another engine that has loaded what the first has saved."""
    engine, found = make_engine(layout), []
    for epoch in range(2):
        mine = batch(epoch)[engine.dp_rank :: engine.dp_size]
        found.append(engine.step(OBJECTIVE, [mine[:1], mine[1:]], Randomness(0)))
        if folder is not None and epoch == 0:
            engine.save(folder / "step_00000001", {})
            engine = make_engine(layout)
            engine.load(folder / "step_00000001")
    return found


def update_of_a_step(rank: int) -> float:
    """What the first step moved the weights of the image stream by, in parts of these."""
    engine = make_engine((1, 1, False))
    own = {n: p for n, p in engine.model.named_parameters() if ".img." in n and ".mod." not in n}
    before = {n: p.detach().clone() for n, p in own.items()}
    engine.step(OBJECTIVE, [batch(0)], Randomness(0))
    norm = lambda tensors: math.sqrt(sum(t.detach().double().square().sum().item() for t in tensors))  # noqa: E731
    return norm([p - before[n] for n, p in own.items()]) / norm(own.values())


@pytest.fixture(scope="module")
def alone() -> list[dict[str, float]]:
    return run_world(1, two_steps, (1, 1, False))[0]


@pytest.mark.parametrize("layout", [(1, 1, False), (2, 1, True), (1, 2, False)], ids=["dp2", "tp2 sp", "cp2"])
def test_a_step_tells_the_same_in_every_layout(alone: list, layout: tuple):
    for found in run_world(2, two_steps, layout):
        for ours, theirs in zip(found, alone, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5)


def test_a_resumed_step_tells_the_same_to_the_bit(tmp_path: Path):
    assert run_world(2, two_steps, (1, 1, False), tmp_path) == run_world(2, two_steps, (1, 1, False))


def test_losses_of_kinds_are_those_of_their_samples(alone: list):
    model = fill(MMDiT(CONFIG))
    given = batch(0)
    inputs, target = OBJECTIVE.prepare(given, Randomness(0), 16)
    with torch.no_grad():
        losses = per_sample_mean((model(inputs) - target) ** 2, inputs)
    expected: dict[str, list[float]] = {}
    for sample, sigma, loss in zip(given, inputs.sigma, losses, strict=True):
        low, high = next((a, b) for a, b in zip(BANDS, BANDS[1:], strict=False) if a < sigma <= b)
        width, height = 8 * sample.latent.shape[-1], 8 * sample.latent.shape[-2]
        for kind in (f"sigma/{low:g}-{high:g}", f"size/{width}x{height}", f"source/{sample.meta['source']}"):
            expected.setdefault(f"loss/{kind}", []).append(loss.item())
    found = {name: value for name, value in alone[0].items() if name.startswith("loss/")}
    assert found == pytest.approx({name: sum(each) / len(each) for name, each in expected.items()}, rel=1e-5)
    assert "loss/source/text" in alone[1] and "loss/source/text" not in alone[0]


def of_few_sources(rank: int) -> list[dict[str, float]]:
    from training.engine import health

    health.SOURCES = 2
    return two_steps(rank, (1, 1, False))


def test_no_more_than_some_sources_are_told_apart(alone: list):
    for found in run_world(2, of_few_sources):
        assert [name for name in alone[1] if name not in found[1]] == ["loss/source/text"]
        assert found[0].keys() == alone[0].keys()


def test_norms_of_groups_make_up_the_whole_and_updates_are_those_of_the_weights(alone: list):
    for row in alone:
        groups = [value for name, value in row.items() if name.startswith("grad_norm/")]
        assert len(groups) == 5 and math.hypot(*groups) == pytest.approx(row["grad_norm"], rel=1e-5)
    assert alone[1]["update/image"] == pytest.approx(run_world(1, update_of_a_step)[0], rel=1e-4)
    assert not any(name.startswith("update/") for name in alone[0])


def test_tokens_and_flops_are_those_of_the_plan(alone: list):
    shapes = [s.latent.shape[-1] * s.latent.shape[-2] // 4 for s in samples()]
    refs = [sum(r.shape[-1] * r.shape[-2] // 4 for r in s.references) for s in samples()]
    assert alone[1]["tokens"] == sum(shapes) + sum(refs) + sum(len(s.txt) for s in samples())
    plans = [
        flops(Setting(CONFIG, EngineConfig(), Work(1, img + ref, len(s.txt)), 1, 4096, "cpu"))
        for s, img, ref in zip(samples(), shapes, refs, strict=True)
    ]
    assert alone[1]["flops"] == sum(plan["forward"] + plan["backward"] for plan in plans)
