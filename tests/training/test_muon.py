"""Muon: near the exact polar factor, the step that torch's own makes, bit for bit through a checkpoint."""

from pathlib import Path

import pytest
import torch
from mixed_batch import CONFIG, fill
from test_checkpoints import same, step, stored
from torch import Tensor
from worlds import run_world

from training.engine.muon import COEFFICIENTS, is_matrix, orthogonal


def make_engine(layout=(1, 1, False), dtype="float32"):
    from training.engine.config import EngineConfig, OptimizerConfig, ParallelConfig
    from training.engine.step import Engine

    optimizer = OptimizerConfig(lr=1e-3, muon_lr=2e-2, eps=1e-4, warmup_steps=0, clip=1e9)
    engine = Engine(CONFIG, EngineConfig(ParallelConfig(*layout), optimizer, dtype=dtype), total_steps=9)
    fill(engine.model)
    engine.weights_changed()
    return engine


def decayed(shape: tuple[int, int, int], power: float) -> tuple[Tensor, Tensor, Tensor]:
    """(U, s, V^T) of random matrices whose singular values fall as a power of their number, as a gradient's do."""
    u, s, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    return u, torch.arange(1, s.shape[1] + 1, dtype=torch.float64).pow(power).expand_as(s), v


def through_the_iterations(s: Tensor) -> Tensor:
    """What becomes of singular values [n, k]."""
    s = s / s.pow(4).sum(1, keepdim=True).pow(0.25)
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return s


SHAPES = ((3, 96, 96), (2, 48, 192), (2, 192, 48), (2, 64, 80))


@pytest.mark.parametrize("power", [0, -0.5, -1, -1.25])
def test_updates_are_near_the_polar_factor(power: float):
    torch.manual_seed(0)
    for shape in SHAPES:
        u, s, v = decayed(shape, power)
        x = (u * s[:, None]) @ v
        assert (s / s.pow(4).sum(1, keepdim=True).pow(0.25)).min() > 0.003
        exact = (u * through_the_iterations(s)[:, None]) @ v
        precise, rough = orthogonal(x.float()).double(), orthogonal(x.bfloat16()).double()
        assert torch.linalg.matrix_norm(precise - u @ v, 2).max() < 0.225  # the iterations' own distance
        torch.testing.assert_close(precise, exact, rtol=0, atol=2e-5)
        assert torch.linalg.matrix_norm(rough - u @ v, 2).max() < 0.4
        values = torch.linalg.svdvals(rough)
        assert 0.7 < values.min() and values.max() < 1.25


def test_what_bfloat16_rounds_does_not_grow():
    """Spectra of which a part is below rounding: nothing is thrown out of where the iterations converge."""
    torch.manual_seed(0)
    for shape in SHAPES:
        u, _, v = decayed(shape, 0)
        number = torch.arange(min(shape[1:]))
        for s in (
            0.1**number,
            10 ** (-5 * number / len(number)),
            torch.where(number < 4, 1.0, 0.0),
            1e-3 + (number < 8),
        ):
            y = orthogonal(((u * s) @ v).bfloat16()).double()
            assert torch.linalg.svdvals(y).max() < 1.3


def test_scale_does_not_matter_and_zero_stays():
    torch.manual_seed(0)
    for shape in SHAPES:
        x = torch.randn(shape)
        for dtype, near in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
            for scale in (1e-6, 1e6):
                torch.testing.assert_close(
                    orthogonal((scale * x).to(dtype)), orthogonal(x.to(dtype)), rtol=0, atol=near
                )
        assert torch.equal(orthogonal(torch.zeros(shape).bfloat16()), torch.zeros(shape).bfloat16())


def trained(rank: int, folder: Path, layout, steps: int, source: Path | None) -> None:
    engine = make_engine(layout)
    if source is not None:
        engine.load(source)
    for epoch in range(engine.step_count, steps):
        step(engine, epoch)
    engine.save(folder, {})


def orthogonal_by_svd(x: Tensor, *_) -> Tensor:
    """In place of torch's, which has other coefficients and iterates in bf16."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    return ((u * through_the_iterations(s[None])[0]) @ v).float() if x.any() else x


def beside_torchs(rank: int) -> dict[str, float]:
    """Largest distance of the weights after three updates from those of torch's optimizers, over the way they went."""
    from mixed_batch import samples
    from torch.optim import _muon

    from training.flow_matching import VelocityMSE
    from training.randomness import Randomness

    _muon._zeropower_via_newtonschulz = orthogonal_by_svd
    engine = make_engine()
    params = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in params.items()}
    theirs = {n: p.clone().requires_grad_() for n, p in before.items()}
    matrices = [p for n, p in theirs.items() if is_matrix(n, p)]
    plain = [p for n, p in theirs.items() if not is_matrix(n, p) and p.ndim > 1]
    undecayed = [p for p in theirs.values() if p.ndim == 1]
    assert len(matrices) > 15 and len(plain) > 5
    groups = [{"params": plain, "weight_decay": 0.01}, {"params": undecayed, "weight_decay": 0.0}]
    optimizers = [
        torch.optim.Muon(matrices, 2e-2, 0.01, 0.95, adjust_lr_fn="original"),
        torch.optim.AdamW(groups, 1e-3, (0.9, 0.95), 1e-4),
    ]
    for epoch in range(3):
        totals = engine.backward(VelocityMSE(), [samples(epoch)], Randomness(0))
        for name, p in params.items():
            theirs[name].grad = p.main_grad / totals["_weight"]
        engine.update(totals)
        for optimizer in optimizers:
            optimizer.step()
    return {n: ((params[n] - theirs[n]).norm() / (theirs[n] - before[n]).norm()).item() for n in params}


def test_equals_torchs_muon_and_leaves_the_rest_to_adamw():
    distances = run_world(1, beside_torchs)[0]
    assert max(distances.values()) <= 1e-4, max(distances, key=distances.get)


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path):
    half, whole, again = (tmp_path / n / "step_00000004" for n in ("half", "whole", "again"))
    run_world(1, trained, half, (1, 1, False), 2, None)
    run_world(1, trained, again, (1, 1, False), 4, half)
    run_world(1, trained, whole, (1, 1, False), 4, None)
    assert same(stored(again), stored(whole))
