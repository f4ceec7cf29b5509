"""Objectives: what a training step minimises, apart from how it is run.

`Objective` is the contract between an algorithm and the engine. The engine runs forwards, splits microbatches, reduces
gradients, clips and steps; an objective turns samples into model inputs and outputs into losses.

The gradient of a step is sum(loss sums) / sum(weights) over all microbatches and ranks: a sample weighs 1 whatever its
size and wherever it was placed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from data_pipeline.sample import EncodedSample
from model.flow import interpolate, logit_normal, mode_density, resolution_mu, shift_sigma, velocity
from model.packing import ModelInputs, pack_inputs, patchify
from training.randomness import Randomness

Frozen = Callable[[str, ModelInputs], Tensor]
"""frozen(name, inputs): velocity [n_target, C] of "ema", "reference" or another frozen copy, run without gradient."""

Metrics = dict[str, Tensor]
"""Sums over the batch's weight; the engine divides them by the total weight."""


class Objective(Protocol):
    """Two pure functions. `align` is the alignment that packs need in this run's layout."""

    def prepare(self, batch: list[Any], rng: Randomness, frozen: Frozen, align: int) -> ModelInputs:
        """Model inputs for the samples of one microbatch (on the CPU; the engine moves them)."""

    def loss(self, output: Tensor, batch: list[Any], inputs: ModelInputs) -> tuple[Tensor, float, Metrics]:
        """(sum of per-sample losses, weight, metrics) for the velocity [n_target, C]."""


def per_sample_mean(squared: Tensor, inputs: ModelInputs) -> Tensor:
    """Mean over tokens and channels of each sample: [n_target, C] -> [S]."""
    return torch.stack([x.mean() for x in inputs.pack.split_targets(squared)])


@dataclass(frozen=True)
class VelocityMSE:
    """Flow matching: E ||v_theta(x_sigma, sigma) - (eps - x0)||^2, mean over a sample's elements, sum over samples.

    Used by pretraining and SFT. sigma follows `density`; with `resolution_shift` it is moved by the schedule's
    resolution-dependent shift, so that training and sampling agree on how noisy a large picture is.
    """

    density: Literal["logit-normal", "uniform", "mode"] = "logit-normal"
    resolution_shift: bool = True
    condition_dropout: float = 0.1
    """Probability that a sample trains with the empty prompt; its references stay."""

    def sigma(self, sample: EncodedSample, rng: Randomness) -> Tensor:
        """Noise level of this draw, fp32 scalar."""
        draw = rng.normal if self.density == "logit-normal" else rng.uniform
        x = draw(sample.key, sample.epoch, "sigma")
        sigma = {"logit-normal": logit_normal, "uniform": lambda u: u, "mode": mode_density}[self.density](x)
        if self.resolution_shift:
            _, frames, height, width = sample.latent.shape
            sigma = shift_sigma(sigma, resolution_mu(frames * height * width // 4))
        return sigma

    def prepare(self, batch: list[EncodedSample], rng: Randomness, frozen: Frozen, align: int) -> ModelInputs:
        sigma = torch.stack([self.sigma(s, rng) for s in batch])
        noise = [rng.normal(s.key, s.epoch, "noise", tuple(s.latent.shape)) for s in batch]
        dropped = [rng.uniform(s.key, s.epoch, "dropout") < self.condition_dropout for s in batch]
        inputs = pack_inputs(
            targets=[interpolate(s.latent, e, t) for s, e, t in zip(batch, noise, sigma, strict=True)],
            texts=[
                s.txt_empty if d and s.txt_empty is not None else s.txt for s, d in zip(batch, dropped, strict=True)
            ],
            sigma=sigma,
            references=[s.references for s in batch],
            align=align,
        )
        target = torch.cat([patchify(velocity(s.latent, e)) for s, e in zip(batch, noise, strict=True)])
        return replace(inputs, target=target)

    def loss(self, output: Tensor, batch: list[EncodedSample], inputs: ModelInputs) -> tuple[Tensor, float, Metrics]:
        loss = per_sample_mean((output.float() - inputs.target) ** 2, inputs).sum()
        return loss, float(len(batch)), {"loss": loss.detach()}
