"""Blocks that recompute or are compiled give the gradients of plain ones."""

import contextlib
import io
import logging
from functools import partial
from unittest import mock

import pytest
import torch
from mixed_batch import CONFIG, fill, samples
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
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


def packs() -> list[list]:
    """Eight packs of different shapes: mixed, of samples that are alike, and of one sample."""
    a, b, c, d = samples()
    return [[a], [a, b, c, d], [b, c], [d], [a, b, c], [a, a], [a, a, a], [b, c, d, b]]


def compilations(rank: int, recompute: str) -> tuple[int, int, list[str], bool]:
    """(compilations when all packs have been seen, later ones, torch's complaints, whether blocks fell back), of steps,
    forward passes without gradient, and those of the moving average."""
    from training.engine.blocks import Compiled
    from training.engine.config import EngineConfig
    from training.engine.step import Engine
    from training.flow_matching import VelocityMSE
    from training.randomness import Randomness

    counter, complaints = CompileCounter(), []
    logging.getLogger("torch._dynamo").addFilter(lambda record: complaints.append(record.getMessage()))
    with mock.patch("torch.compile", partial(torch.compile, backend=counter)):
        engine = Engine(CONFIG, EngineConfig(compile=True, recompute=recompute))
    fill(engine.model)
    engine.weights_changed()
    counts = []
    for _ in range(2):
        for batch in packs():
            engine.backward(VelocityMSE(), [batch], Randomness(7))
            inputs, _ = VelocityMSE().prepare(batch, Randomness(7), engine.align)
            with torch.no_grad():
                policy = engine.model(inputs)
            assert torch.equal(engine.frozen["ema"](inputs), policy)
        counts.append(counter.frame_count)
    return counts[0], counts[1] - counts[0], complaints, Compiled.said


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_compilations_are_bounded_whatever_packs_come(recompute: str):
    from training.engine.blocks import VARIANTS

    [(first, later, complaints, said)] = run_world(1, compilations, recompute)
    assert 0 < first <= VARIANTS and later == 0
    assert complaints == [] and not said


def beyond_the_limit(rank: int) -> tuple[list, str]:
    """(gradients' differences from plain ones, what was said) where a forward may be compiled but once."""
    from training.engine import blocks

    plain = gradients({}, packs())
    said = io.StringIO()
    with mock.patch("torch.compile", partial(torch.compile, backend="eager")), mock.patch.object(blocks, "VARIANTS", 1):
        with contextlib.redirect_stderr(said):
            found = gradients({"compile": True}, packs())
    errors = [
        max((f[n] - g).abs().max() / (1 + g.abs().max()) for n, g in p.items())
        for f, p in zip(found, plain, strict=True)
    ]
    return [e.item() for e in errors], said.getvalue()


def test_blocks_that_are_compiled_too_often_say_so_once_and_go_on():
    [(errors, said)] = run_world(1, beyond_the_limit)
    assert max(errors) < 1e-5
    assert said.count("run uncompiled") == 1


def attention_calls(rank: int) -> list[int]:
    """Calls of the attention kernel in a step that keeps all activations, and in ones that recompute some."""
    from training.engine.blocks import _KEPT

    class Calls(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.name().partition(".")[0]
            self.count += name in _KEPT and "attention" in name
            return function(*args, **(kwargs or {}))

    found = []
    for recompute in ("none", "selective", "block"):
        with Calls() as calls:
            gradients({"recompute": recompute}, [samples()])
        found.append(calls.count)
    return found


def test_selective_recomputation_runs_attention_once():
    [(none, selective, block)] = run_world(1, attention_calls)
    assert none == selective > 0 and block == 2 * none


def test_selective_recomputation_is_not_for_compiled_blocks():
    from training.engine.config import EngineConfig

    with pytest.raises(ValueError, match="use recompute none or block"):
        EngineConfig(compile=True, recompute="selective")
