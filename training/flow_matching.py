"""Flow matching: the loss of pretraining and supervised fine-tuning."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data_pipeline.sample import EncodedSample
from model.flow import interpolate, logit_normal, mode_density, resolution_mu, shift_sigma, velocity
from model.packing import ModelInputs, pack_inputs, patchify
from model.sampling.draw import Request
from model.sampling.guidance import Condition
from training.algorithm import Frozen, FrozenPolicy, Metrics, Model
from training.randomness import Randomness


@dataclass
class VelocityMSE:
    """E ||v_theta(x_sigma, sigma) - (eps - x0)||^2, mean over a sample's elements, sum over samples.

    sigma follows `density`; with `resolution_shift` it is moved by the schedule's resolution-dependent shift, so that
    training and sampling agree on how noisy a large picture is.
    """

    density: Literal["logit-normal", "uniform", "mode"] = "logit-normal"
    density_mean: float = 0.0
    density_std: float = 1.0
    """Of the logit-normal density, before the shift."""
    resolution_shift: bool = True
    shift: float | None = None
    """Factor s of sigma' = s sigma / (1 + (s - 1) sigma), whatever the resolution, in place of `resolution_shift`."""
    condition_dropout: float = 0.1
    """Probability that a sample trains with the empty prompt; its references stay."""

    @property
    def frozen(self) -> Mapping[str, FrozenPolicy]:
        return {}

    def sigma(self, sample: EncodedSample, rng: Randomness) -> Tensor:
        """Noise level of this draw, fp32 scalar."""
        if self.density == "logit-normal":
            z = rng.normal(sample.key, sample.epoch, "sigma")
            sigma = logit_normal(z, self.density_mean, self.density_std)
        else:
            u = rng.uniform(sample.key, sample.epoch, "sigma")
            sigma = mode_density(u) if self.density == "mode" else u
        if self.shift is not None:
            return shift_sigma(sigma, math.log(self.shift))
        if self.resolution_shift:
            _, frames, height, width = sample.latent.shape
            sigma = shift_sigma(sigma, resolution_mu(frames * height * width // 4))
        return sigma

    def prepare(self, batch: list[EncodedSample], rng: Randomness, align: int) -> tuple[ModelInputs, Tensor]:
        """Model inputs, and their targets [n_target, C]."""
        sigma = torch.stack([self.sigma(s, rng) for s in batch])
        noise = [rng.normal(s.key, s.epoch, "noise", tuple(s.latent.shape)) for s in batch]
        dropped = [rng.uniform(s.key, s.epoch, "dropout") < self.condition_dropout for s in batch]
        texts = [s.txt_empty if d and s.txt_empty is not None else s.txt for s, d in zip(batch, dropped, strict=True)]
        return noised(batch, texts, noise, sigma, align)

    def loss(self, model: Model, frozen: Frozen, inputs: ModelInputs, target: Tensor) -> tuple[Tensor, float, Metrics]:
        losses = per_sample_mean((model(inputs).float() - target) ** 2, inputs)
        return losses.sum(), float(inputs.pack.n_samples), {"loss": losses.detach()}


def noised(
    samples: list[EncodedSample], texts: list[Tensor], noise: list[Tensor], sigma: Tensor, align: int
) -> tuple[ModelInputs, Tensor]:
    """Packed inputs at noise levels sigma [S], and the velocities [n_target, C] that lead there."""
    inputs = pack_inputs(
        targets=[interpolate(s.latent, e, t) for s, e, t in zip(samples, noise, sigma, strict=True)],
        texts=texts,
        sigma=sigma,
        references=[s.references for s in samples],
        align=align,
    )
    return inputs, torch.cat([patchify(velocity(s.latent, e)) for s, e in zip(samples, noise, strict=True)])


def samples_shown(samples: Sequence[EncodedSample]) -> list[Request]:
    """Requests for pictures of samples' prompts at fixed seeds."""
    rng = Randomness(0)
    return [
        Request(
            Condition(s.txt, s.txt_empty, tuple(s.references)), rng.normal(s.key, 0, "sample", tuple(s.latent.shape))
        )
        for s in samples
    ]


def per_sample_mean(squared: Tensor, inputs: ModelInputs) -> Tensor:
    """Mean over tokens and channels of each sample: [n_target, C] -> [S]."""
    return torch.stack([x.mean() for x in inputs.pack.split_targets(squared)])
