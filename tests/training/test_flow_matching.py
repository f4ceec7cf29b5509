"""VelocityMSE: its inputs, its law of noise levels, and that a batch is its samples."""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import scipy.stats
import torch
from mixed_batch import samples
from torch.distributions import Normal, SigmoidTransform, TransformedDistribution

from model.packing import patchify
from training.flow_matching import VelocityMSE, per_sample_mean
from training.randomness import Randomness

RNG = Randomness(11)


def prepare(batch, objective=None):
    """(inputs, target)"""
    return (objective or VelocityMSE()).prepare(batch, RNG, align=16)


def test_inputs_lie_on_the_line_between_data_and_noise():
    batch, objective = samples(), VelocityMSE(condition_dropout=0)
    inputs, target = prepare(batch, objective)
    pieces = zip(inputs.pack.split_targets(inputs.img), inputs.pack.split_targets(target), strict=True)
    for (x, v), sample, sigma in zip(pieces, batch, inputs.sigma, strict=True):
        noise = RNG.normal(sample.key, sample.epoch, "noise", tuple(sample.latent.shape))
        torch.testing.assert_close(x - sigma * v, patchify(sample.latent), rtol=0, atol=1e-5)  # sigma = 0
        torch.testing.assert_close(x + (1 - sigma) * v, patchify(noise), rtol=0, atol=1e-5)  # sigma = 1
    references = torch.cat([patchify(r) for s in batch for r in s.references])
    n = inputs.pack.n_target
    assert torch.equal(inputs.img[n : n + len(references)], references)


def test_a_batch_is_its_samples():
    batch = samples()
    together, targets = prepare(batch)
    for i, sample in enumerate(batch):
        alone, target = prepare([sample])
        assert torch.equal(alone.sigma[0], together.sigma[i])
        assert torch.equal(target, together.pack.split_targets(targets)[i])


def test_the_loss_weighs_every_sample_alike_whatever_its_size():
    batch, objective = samples(), VelocityMSE()
    inputs, target = prepare(batch)
    output = torch.randn_like(target)
    total, weight, metrics = objective.loss(lambda inputs: output, {}, inputs, target)
    singles = [
        torch.nn.functional.mse_loss(o, t)
        for o, t in zip(inputs.pack.split_targets(output), inputs.pack.split_targets(target), strict=True)
    ]
    torch.testing.assert_close(total, sum(singles))
    torch.testing.assert_close(per_sample_mean((output - target) ** 2, inputs), torch.stack(singles))
    assert weight == 4 and metrics["loss"].sum() == total


def many(n: int):
    sample = samples()[0]
    return [dataclasses.replace(sample, key=f"k{i}") for i in range(n)]


@pytest.mark.parametrize(
    "density, mean, std", [("logit-normal", 0.0, 1.0), ("logit-normal", 0.5, 0.7), ("uniform", 0, 1)]
)
def test_noise_levels_follow_their_law(density: str, mean: float, std: float):
    objective = VelocityMSE(density, mean, std, resolution_shift=False)
    sigma = torch.stack([objective.sigma(s, RNG) for s in many(3000)])
    law = TransformedDistribution(Normal(mean, std), SigmoidTransform())
    cdf = {"logit-normal": lambda x: law.cdf(torch.as_tensor(x)).numpy(), "uniform": "uniform"}[density]
    assert scipy.stats.kstest(sigma.numpy(), cdf).pvalue > 1e-3


def test_larger_pictures_get_more_noise():
    plain, shifted = VelocityMSE(resolution_shift=False), VelocityMSE()
    small = samples()[0]
    large = dataclasses.replace(small, latent=torch.zeros(16, 1, 166, 166))  # 1328 px
    mu = 0.5 + (0.9 - 0.5) * (83 * 83 - 256) / (8192 - 256)
    assert mu == pytest.approx(0.834, abs=1e-3)  # Qwen-Image's schedule at 1328 px
    t, moved = plain.sigma(large, RNG).item(), shifted.sigma(large, RNG).item()
    assert moved == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / t - 1), rel=1e-5)
    assert moved > shifted.sigma(small, RNG).item() > 0


def test_condition_dropout_swaps_the_text_and_keeps_the_references():
    batch = [dataclasses.replace(s, references=samples()[1].references) for s in many(2000)]
    inputs, _ = prepare(batch, VelocityMSE(condition_dropout=0.25))
    dropped = torch.tensor([s.txt == len(batch[0].txt_empty) for s in inputs.pack.shapes])
    low, high = scipy.stats.binom.interval(0.999, 2000, 0.25)
    assert low <= dropped.sum() <= high
    assert all(len(s.references) == 1 for s in inputs.pack.shapes)
    assert not any(s.txt == 2 for s in prepare(batch[:200], VelocityMSE(condition_dropout=0))[0].pack.shapes)


def test_prepare_runs_ahead_in_another_thread():
    """It touches no model and no shared state: what a thread prepares is what this one does."""
    batch = samples()
    inputs, target = prepare(batch)
    with ThreadPoolExecutor(2) as pool:
        for ahead, ahead_target in pool.map(lambda _: prepare(batch), range(4)):
            assert torch.equal(ahead.img, inputs.img) and torch.equal(ahead_target, target)
