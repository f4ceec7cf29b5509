"""Rollouts: pictures drawn with random steps, of which each keeps what a policy gradient needs.

A trajectory is a chain of Gaussian steps x_k -> x_{k+1} (model/sampler.py), so its probability under any policy is
known exactly: that makes a sampler of the flow into a policy (Flow-GRPO, arXiv 2505.05470). Latents and
log-probabilities stay in fp32, and a step is trained in the very pack in which it was drawn: on an unchanged policy the
ratio of probabilities is then one, up to what the kernels themselves cannot repeat.

Shape legend: S pictures of one pack, L target tokens of all of them, C channels of a token.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.flow import schedule
from model.packing import ModelInputs, patchify, token_size, unpatchify
from model.sampler import SDE, Guidance, Velocity, log_prob, sde_moments


@dataclass(frozen=True)
class Transition:
    """One random step of the pictures of a pack."""

    guidance: Guidance
    x: Tensor
    """fp32 [L, C] before the step."""
    x_next: Tensor
    """fp32 [L, C] after it."""
    sigma: Tensor
    """[S] noise level before the step, on the CPU."""
    sigma_next: Tensor
    sigma_max: Tensor
    """[S] second level of the schedule (see `sde_moments`)."""
    noise_level: float
    kind: SDE
    log_prob: Tensor
    """fp32 [S] under the policy that drew the step."""
    advantage: Tensor
    """fp32 [S]"""

    def inputs(self) -> ModelInputs:
        return self.guidance.inputs(self.x, self.sigma)

    def moments(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [L, C] and standard deviation [L, 1] of the step of a policy whose model answered `output`."""
        levels = (self.guidance.per_token(s.to(self.x.device)) for s in (self.sigma, self.sigma_next, self.sigma_max))
        sigma, sigma_next, sigma_max = levels
        v = self.guidance.combine(output.float())
        return sde_moments(self.x, v, sigma, sigma_next, self.noise_level, sigma_max, self.kind)

    def mean_log_prob(self, mean: Tensor, std: Tensor) -> Tensor:
        """Log density of the step, *averaged* over a picture's tokens and channels: [S]."""
        return self.per_picture(log_prob(self.x_next, mean, std))

    def per_picture(self, values: Tensor) -> Tensor:
        """Mean over tokens and channels: [L, C] -> [S]."""
        return torch.stack([piece.mean() for piece in self.guidance.split(values)])


def random_steps(steps: int, window: int, start: float) -> range:
    """Which of a trajectory's steps are random: all but the last, or `window` consecutive ones of the first half.

    `start` in [0, 1) picks the window's place. The last step is never random: noise left in x0 would be seen, and a
    CPS step to sigma = 0 has no density. Raises ValueError for a window that does not fit.
    """
    if not window:
        return range(steps - 1)
    last = max(steps // 2, window)
    if not 0 < window <= steps - 1:
        raise ValueError(
            f"a window of {window} random steps does not fit into {steps} steps, of which the last is fixed"
        )
    first = int(start * (last - window + 1))
    return range(first, first + window)


@torch.no_grad()
def rollout(
    velocity: Velocity,
    guidance: Guidance,
    noise: list[Tensor],
    draw: Callable[[int, int, tuple[int, ...]], Tensor],
    steps: int,
    random: Collection[int],
    noise_level: float,
    kind: SDE = "flow-grpo",
) -> tuple[list[Tensor], list[Transition]]:
    """Draw the pictures of a pack from `noise` [C, F, H, W]; returns their latents and their random steps.

    Step k of `steps` is random if k is in `random`, with the standard normal `draw(picture, k, shape)`, and the ODE's
    otherwise. Advantages are left at 0 for the caller to fill in.
    """
    sizes = [token_size(n) for n in noise]
    x = torch.cat([patchify(n.float()) for n in noise])
    sigmas = torch.stack([schedule(steps, math.prod(size)) for size in sizes])
    transitions = []
    for k in range(steps):
        step = Transition(
            guidance, x, x, sigmas[:, k], sigmas[:, k + 1], sigmas[:, 1], noise_level if k in random else 0.0, kind,
            log_prob=x.new_zeros(len(noise)), advantage=x.new_zeros(len(noise)),
        )  # fmt: skip
        mean, std = step.moments(velocity(step.inputs()))
        x = mean
        if k in random:
            eps = [draw(i, k, tuple(piece.shape)) for i, piece in enumerate(guidance.split(mean))]
            x = mean + std * torch.cat(eps).to(mean.device)
            step = replace(step, x_next=x)
            transitions.append(replace(step, log_prob=step.mean_log_prob(mean, std)))
    return [unpatchify(t, size) for t, size in zip(guidance.split(x), sizes, strict=True)], transitions
