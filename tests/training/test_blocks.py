"""Blocks that recompute or are compiled give the gradients of plain ones."""

import pytest
import torch
from mixed_batch import CONFIG, fill, samples
from worlds import run_world


def gradients(settings: dict, batches: list[list]) -> list[dict]:
    """Gradients of every parameter by an engine of one process, for one batch after the other."""
    from training.engine.config import EngineConfig
    from training.engine.step import Engine
    from training.flow_matching import VelocityMSE
    from training.randomness import Randomness

    engine = Engine(CONFIG, EngineConfig(**settings))
    fill(engine.model)
    engine.weights_changed()
    found = []
    for batch in batches:
        engine.backward(VelocityMSE(), [batch], Randomness(7))
        found.append({n: p.main_grad.clone() for n, p in engine.model.named_parameters() if p.requires_grad})
    return found


def recomputed(rank: int, dtype: str) -> dict[str, bool]:
    (plain,) = gradients({"dtype": dtype}, [samples()])
    same = {}
    for recompute in ("selective", "block"):
        (found,) = gradients({"dtype": dtype, "recompute": recompute}, [samples()])
        same[recompute] = all(torch.equal(found[n], g) for n, g in plain.items())
    return same


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputation_changes_no_bit(dtype: str):
    assert run_world(1, recomputed, dtype) == [{"selective": True, "block": True}]


def compiled(rank: int, recompute: str) -> float:
    """Largest relative error of compiled blocks; RuntimeError if packs of known sizes compile anything anew."""
    everything = samples()
    batches = [everything[:1], everything, everything[1:3], everything[3:], everything[:3], everything[2:]]
    plain = gradients({"recompute": recompute}, batches)
    gradients({"recompute": recompute, "compile": True}, batches[:2])
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = gradients({"recompute": recompute, "compile": True}, batches)
    return max(
        ((f[n] - g).abs().max() / p_max(g)).item()
        for f, p in zip(found, plain, strict=True)
        for n, g in p.items()
        if g.any()
    )


def p_max(g: torch.Tensor) -> torch.Tensor:
    return g.abs().max()


@pytest.mark.skipif(" " in torch.__file__, reason="inductor's C++ build takes no path with a space")
@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_compiled_blocks_equal_plain_ones(recompute: str):
    (error,) = run_world(1, compiled, recompute, deadline_s=500)
    assert error < 1e-4


def test_selective_recomputation_is_not_for_compiled_blocks():
    from training.engine.config import EngineConfig

    with pytest.raises(ValueError, match="use recompute none or block"):
        EngineConfig(compile=True, recompute="selective")
