"""Schedules: which noise level a picture goes to next.

A `Schedule` begins a `Walk` for each pack that is drawn. The walk is asked after every evaluation of the model and
answers for each picture on its own; a picture whose next level is 0 is finished and leaves the pack. A schedule may
hold a module that learns, and look at what the model computes by hooks of its own.

Shape legend: S pictures of a pack that are not finished.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from model.flow import resolution_mu
from model.packing import Size

if TYPE_CHECKING:
    from model.sampling.guidance import Guidance

SHIFT_TERMINAL = 0.02


@dataclass(frozen=True)
class View:
    """What is known when the next noise levels are chosen."""

    step: int
    """Evaluations of the model before this one."""
    pictures: tuple[int, ...]
    """Which of the pack's first pictures the others are about, S of them: the finished ones are gone."""
    sigma: Tensor
    """fp32 [S] noise levels, on the CPU."""
    x: Tensor
    """fp32 [L, C] tokens of the pictures at those levels."""
    v: Tensor
    """fp32 [L, C] guided velocities."""
    guidance: "Guidance"
    """The layout: `split` and `per_token` go from tokens to pictures and back."""


class Walk(Protocol):
    """One pack's way from sigma = 1 to 0."""

    def __call__(self, view: View) -> Tensor:
        """The next noise levels, fp32 [S] on the CPU, each below the present one; 0 ends a picture."""


class Schedule(Protocol):
    """Where pictures go, whoever draws them."""

    def begin(self, sizes: list[Size]) -> Walk:
        """The walk of pictures of these sizes (frames, height, width in tokens)."""


@dataclass(frozen=True)
class FixedSchedule:
    """The scheduler's levels in so many steps, shifted by each picture's size. ValueError for fewer than 2 steps."""

    steps: int = 50

    def __post_init__(self):
        if self.steps < 2:
            raise ValueError(
                f"sampling needs at least 2 steps, got {self.steps} (the schedule's stretch is 0/0 with one)"
            )

    def begin(self, sizes: list[Size]) -> Walk:
        levels = torch.stack([noise_levels(self.steps, math.prod(size)) for size in sizes])
        return lambda view: levels[list(view.pictures), view.step + 1]


def noise_levels(steps: int, image_tokens: int) -> Tensor:
    """The scheduler's noise levels, fp32 [steps + 1], from 1 to 0, for a picture of `image_tokens` target tokens.

    Linear in sigma, shifted by `flow.resolution_mu`, stretched to end at .02 before the final 0. Equal to
    FlowMatchEulerDiscreteScheduler with Qwen-Image's settings for 2 steps or more.
    """
    sigma = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64)
    mu = resolution_mu(image_tokens)
    sigma = math.exp(mu) / (math.exp(mu) + (1 / sigma - 1))
    one_minus = 1 - sigma
    sigma = 1 - one_minus * ((1 - SHIFT_TERMINAL) / one_minus[-1])
    return torch.cat([sigma, sigma.new_zeros(1)]).float()
