"""Sampling: Euler ODE, SDE steps with their densities, true classifier-free guidance; everything in token space.

    ODE        x' = x + dt v,                                     dt = sigma' - sigma < 0
    Flow-GRPO  x' ~ N(x + dt [v + s^2 / (2 sigma) (x + (1 - sigma) v)], -dt s^2),   s = a sqrt(sigma / (1 - sigma))
               (arXiv 2505.05470, Eq. 9)
    CPS        x' ~ N((1 - sigma') x0 + sigma' cos(a pi/2) eps, (sigma' sin(a pi/2))^2)   with x0, eps implied by v
               (coefficients-preserving sampling, arXiv 2509.05952)

Shape legend: S pictures, L target tokens of all pictures (one after another), C channels of a token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.flow import schedule
from model.packing import ModelInputs, Pack, SampleShape, Size, patchify, token_size, unpatchify

Velocity = Callable[[ModelInputs], Tensor]
"""An MMDiT, or anything that maps packed inputs to velocities [n_target, C]."""

SDE = Literal["flow-grpo", "cps"]


@dataclass(frozen=True)
class Condition:
    """What one picture is drawn from."""

    txt: Tensor
    """[length, D] hidden states of the prompt."""
    txt_empty: Tensor | None = None
    """[length, D] hidden states of the negative prompt, with the same pictures in it; needed for guidance."""
    references: tuple[Tensor, ...] = ()
    """Latents [C, 1, h, w] of the pictures to edit."""

    def to(self, device: torch.device | str) -> "Condition":
        empty = None if self.txt_empty is None else self.txt_empty.to(device)
        return Condition(self.txt.to(device), empty, tuple(r.to(device) for r in self.references))


class Guidance:
    """A fixed batch of conditions and sizes, laid out once: positives and, if `cfg_scale` > 1, negatives in one pack.

    The true CFG of Qwen-Image: neg + scale (pos - neg), rescaled per token to the norm of pos. Raises ValueError for a
    negative prompt that is missing.
    """

    def __init__(self, conditions: list[Condition], sizes: list[Size], cfg_scale: float = 4.0, align: int = 16):
        """`sizes` in tokens (frames, height, width). The pack lives where the conditions live."""
        if len(conditions) != len(sizes):
            raise ValueError(f"{len(conditions)} conditions, but {len(sizes)} sizes")
        texts = [c.txt for c in conditions]
        self.cfg_scale, self.guided = cfg_scale, cfg_scale > 1
        if self.guided:
            if any(c.txt_empty is None for c in conditions):
                raise ValueError("guidance needs the negative prompt of every picture; encode ' ' if there is none")
            texts += [c.txt_empty for c in conditions]
            conditions, sizes = conditions * 2, sizes * 2
        shapes = [
            SampleShape(len(txt), size, tuple(map(token_size, c.references)))
            for txt, size, c in zip(texts, sizes, conditions, strict=True)
        ]
        self.pack = Pack.of(shapes, align).to(texts[0].device)
        self.lengths = self.pack.target_lengths[: len(sizes) // (2 if self.guided else 1)]
        references = [patchify(r) for c in conditions for r in c.references]
        self._txt = _fill(texts, len(self.pack.txt_pos))
        self._references = references

    def inputs(self, x: Tensor, sigma: Tensor) -> ModelInputs:
        """Inputs of the model for the pictures' tokens x [L, C] at noise levels sigma [S] (on the CPU)."""
        levels, row = torch.unique(sigma.cpu(), return_inverse=True)
        copies = 2 if self.guided else 1
        img = _fill([x] * copies + self._references, len(self.pack.img_pos))
        return ModelInputs(img, self._txt, levels.to(x.device), self.pack, sigma_row=tuple(row.tolist()) * copies)

    def combine(self, output: Tensor) -> Tensor:
        """Guided velocity [L, C] from the model's output on `inputs`; differentiable through both branches."""
        if not self.guided:
            return output
        pos, neg = output.chunk(2)
        both = neg + self.cfg_scale * (pos - neg)
        norm = both.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(both.dtype).tiny)
        return both * (pos.norm(dim=-1, keepdim=True) / norm)

    def per_token(self, values: Tensor) -> Tensor:
        """[S] -> [L, 1]: the value of each token's picture."""
        lengths = torch.tensor(self.lengths, device=values.device)
        return values.repeat_interleave(lengths)[:, None]

    def split(self, x: Tensor) -> list[Tensor]:
        """[L, ...] -> one piece a picture."""
        return list(x.split(self.lengths))


def _fill(parts: list[Tensor], length: int) -> Tensor:
    tail = length - sum(map(len, parts))
    return torch.cat([*parts, parts[0].new_zeros(tail, parts[0].shape[1])])


@torch.no_grad()
def sample(
    velocity: Velocity,
    conditions: list[Condition],
    noise: list[Tensor],
    steps: int = 50,
    cfg_scale: float = 4.0,
    align: int = 16,
) -> list[Tensor]:
    """Latents drawn by `steps` Euler steps from `noise` [C, F, H, W] (any mix of sizes), fp32, one a condition.

    Raises ValueError for input, or a model's output, that is not finite.
    """
    sizes = [token_size(n) for n in noise]
    guidance = Guidance(conditions, sizes, cfg_scale, align)
    for i, (c, n) in enumerate(zip(conditions, noise, strict=True)):
        if not all(t.isfinite().all() for t in (n, c.txt, *c.references, *([c.txt_empty] if guidance.guided else []))):
            raise ValueError(f"picture {i}: its noise, prompt or references hold NaN or infinite values")
    x = torch.cat([patchify(n.float()) for n in noise])
    sigmas = torch.stack([schedule(steps, math.prod(size)) for size in sizes])
    dt = [guidance.per_token(d.to(x.device)) for d in sigmas.diff(dim=1).unbind(1)]
    for i in range(steps):
        v = guidance.combine(velocity(guidance.inputs(x, sigmas[:, i])).float())
        x = x + dt[i] * v
    if not x.isfinite().all():
        raise ValueError("the model's velocities are NaN or infinite although its inputs are not: its weights are bad")
    return [unpatchify(t, size) for t, size in zip(guidance.split(x), sizes, strict=True)]


def sde_moments(
    x: Tensor,
    v: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    noise_level: float,
    sigma_max: Tensor | float,
    kind: SDE = "flow-grpo",
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the stochastic step from x at `sigma` to `sigma_next`; all broadcast to x.

    `noise_level` is a above; at 0, and where sigma_next = 0, the step is the ODE's exactly and std is 0. `sigma_max`,
    the schedule's second level, stands for sigma in 1 - sigma where sigma = 1 (s would be infinite).
    """
    dt = sigma_next - sigma
    ode = x + dt * v
    if kind == "cps":
        angle = noise_level * math.pi / 2
        std = sigma_next * math.sin(angle)
        return ode + (math.cos(angle) - 1) * sigma_next * (x + (1 - sigma) * v), std
    sigma_max = torch.as_tensor(sigma_max, dtype=sigma.dtype, device=sigma.device)
    variance = noise_level**2 * sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))
    variance = torch.where(sigma_next == 0, 0.0, variance)
    return ode + dt * variance / (2 * sigma) * (x + (1 - sigma) * v), (-dt * variance).sqrt()


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Elementwise log density of N(mean, std^2) at x_next; 0, without gradient, where std = 0 (an ODE step).

    Flow-GRPO's log-probability of a step is the *mean* of this over a picture's tokens and channels.
    """
    noisy = std > 0
    safe = torch.where(noisy, std, 1.0)
    density = -((x_next - mean) ** 2) / (2 * safe**2) - safe.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(noisy, density, 0.0)
