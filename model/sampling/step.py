"""Steps: how a picture gets from one noise level to the next, with the density of the random ones.

    ODE  x' = x + dt v,                                     dt = sigma' - sigma < 0
    SDE  x' ~ N(x + dt [v + s^2 / (2 sigma) (x + (1 - sigma) v)], -dt s^2),   s = a sqrt(sigma / (1 - sigma))
         (Flow-GRPO, arXiv 2505.05470, Eq. 9)
    CPS  x' ~ N((1 - sigma') x0 + sigma' cos(a pi/2) eps, (sigma' sin(a pi/2))^2)   with x0, eps implied by v
         (coefficients-preserving sampling, arXiv 2509.05952)

Shape legend: L tokens, C channels of a token.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Step(Protocol):
    """A step's Gaussian. `random` says whether any of it is random at all."""

    random: bool

    def at(self, index: int) -> "Step":
        """The step made after `index` evaluations of the model."""

    def moments(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the step from x at `sigma` to `sigma_next`; all broadcast to x [L, C]."""


@dataclass(frozen=True)
class ODE:
    """The Euler step of the flow."""

    random = False

    def at(self, index: int) -> Step:
        return self

    def moments(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        return x + (sigma_next - sigma) * v, torch.zeros_like(sigma)


@dataclass(frozen=True)
class SDE:
    """Flow-GRPO's step. At noise level 0, and where sigma' = 0, it is the ODE's exactly.

    At sigma = 1, where s would be infinite, sigma' stands for sigma in 1 - sigma (as in Flow-GRPO's code).
    """

    noise_level: float = 0.7
    """a above."""

    def __post_init__(self):
        if self.noise_level < 0:
            raise ValueError(f"a noise level is not negative, got {self.noise_level}")

    @property
    def random(self) -> bool:
        return self.noise_level > 0

    def at(self, index: int) -> Step:
        return self

    def moments(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        dt = sigma_next - sigma
        variance = self.noise_level**2 * sigma / (1 - torch.where(sigma == 1, sigma_next, sigma))
        variance = torch.where(sigma_next == 0, 0.0, variance)
        return x + dt * v + dt * variance / (2 * sigma) * (x + (1 - sigma) * v), (-dt * variance).sqrt()


@dataclass(frozen=True)
class CPS:
    """Coefficients-preserving sampling; at noise level 0, and where sigma' = 0, the ODE's step exactly.

    Raises ValueError for a noise level above 1, where the cosine would turn the kept noise around.
    """

    noise_level: float = 0.7
    """a above, at most 1: all noise is new."""

    def __post_init__(self):
        if not 0 <= self.noise_level <= 1:
            raise ValueError(f"the noise level of CPS lies in [0, 1], got {self.noise_level}")

    @property
    def random(self) -> bool:
        return self.noise_level > 0

    def at(self, index: int) -> Step:
        return self

    def moments(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        angle = self.noise_level * math.pi / 2
        mean = x + (sigma_next - sigma) * v + (math.cos(angle) - 1) * sigma_next * (x + (1 - sigma) * v)
        return mean, sigma_next * math.sin(angle)


@dataclass(frozen=True)
class Window:
    """`step` at some places of a picture's way, the ODE's elsewhere (MixGRPO, arXiv 2507.21802)."""

    step: Step
    places: range

    random = True

    def at(self, index: int) -> Step:
        return self.step if index in self.places else ODE()

    def moments(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        raise TypeError("a window has no moments of its own: ask the step `at` a place")


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Elementwise log density of N(mean, std^2) at x_next; 0, without gradient, where std = 0 (an ODE step).

    Flow-GRPO's log-probability of a step is the *mean* of this over a picture's tokens and channels.
    """
    noisy = std > 0
    safe = torch.where(noisy, std, 1.0)
    density = -((x_next - mean) ** 2) / (2 * safe**2) - safe.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(noisy, density, 0.0)
