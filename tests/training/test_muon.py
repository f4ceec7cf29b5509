"""Muon: the step that torch's own makes, on any number of data-parallel ranks, through checkpoints."""

from pathlib import Path

import pytest
import torch
from mixed_batch import CONFIG, fill
from test_checkpoints import same, step, stored
from worlds import run_world

from training.engine.muon import is_matrix, orthogonal


def make_engine(layout=(1, 1, False), dtype="float32"):
    from training.engine.config import EngineConfig, OptimizerConfig, ParallelConfig
    from training.engine.step import Engine

    optimizer = OptimizerConfig(lr=1e-3, muon_lr=2e-2, eps=1e-4, warmup_steps=0, clip=1e9)
    engine = Engine(CONFIG, EngineConfig(ParallelConfig(*layout), optimizer, dtype=dtype), total_steps=9)
    fill(engine.model)
    engine.weights_changed()
    return engine


def test_singular_values_come_near_one_and_vectors_stay():
    torch.manual_seed(0)
    for shape in ((3, 12, 12), (2, 8, 24), (2, 24, 8)):
        x = torch.randn(shape) * torch.tensor([1e-6, 1e3, 1.0][: shape[0]])[:, None, None]
        y = orthogonal(x)
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        inner = u.mT @ y @ v.mT
        assert torch.linalg.svdvals(y).sub(1).abs().max() < 0.5
        torch.testing.assert_close(inner, torch.diag_embed(inner.diagonal(dim1=1, dim2=2)), rtol=0, atol=2e-3)
    assert torch.equal(orthogonal(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def trained(rank: int, folder: Path, layout, steps: int, source: Path | None) -> None:
    engine = make_engine(layout)
    if source is not None:
        engine.load(source)
    for epoch in range(engine.step_count, steps):
        step(engine, epoch)
    engine.save(folder, {})


def orthogonal_plainly(x, coefficients, steps, eps):
    """In place of torch's, which iterates in bf16; an fp32 model's Muon does it in fp32."""
    a, b, c = coefficients
    y = x.T if x.shape[0] > x.shape[1] else x
    y = y / y.norm().clamp(min=eps)
    for _ in range(steps):
        square = y @ y.T
        y = a * y + (b * square + c * square @ square) @ y
    return y.T if x.shape[0] > x.shape[1] else y


def beside_torchs(rank: int) -> dict[str, float]:
    """Largest distance of the weights after three updates from those of torch's optimizers, over the way they went."""
    from mixed_batch import samples
    from torch.optim import _muon

    from training.flow_matching import VelocityMSE
    from training.randomness import Randomness

    _muon._zeropower_via_newtonschulz = orthogonal_plainly
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


def test_ranks_share_it_and_checkpoints_go_round(tmp_path: Path):
    one, two, ring = (tmp_path / n / "step_00000004" for n in ("one", "two", "ring"))
    half = [tmp_path / f"half{i}" / "step_00000002" for i in range(2)]
    run_world(1, trained, one, (1, 1, False), 4, None)
    run_world(2, trained, two, (1, 1, False), 4, None)
    run_world(2, trained, half[0], (1, 1, False), 2, None)
    run_world(1, trained, ring, (1, 1, False), 4, half[0])
    run_world(1, trained, half[1], (1, 1, False), 2, None)
    run_world(1, trained, tmp_path / "again" / "step_00000004", (1, 1, False), 4, half[1])
    whole = stored(one)
    assert same(stored(tmp_path / "again" / "step_00000004"), whole), "bit for bit in one layout"
    for other in (two, ring):
        for name, tensor in stored(other).items():
            assert (tensor - whole[name]).norm() <= 1e-4 * whole[name].norm() + 1e-7, (other.parent.name, name)


def test_tensor_parallel_is_refused():
    with pytest.raises(AssertionError, match="no tensor-parallel form"):
        run_world(2, make_only, (2, 1, False))


def make_only(rank: int, layout) -> None:
    make_engine(layout)
