"""Advantages: how much better a picture is than the other pictures of its prompt (GRPO, arXiv 2402.03300, section 4.1).

Shape legend: P prompts, G pictures of each.
"""

from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-4
"""Added to the standard deviation, as in Flow-GRPO's code."""


def group_advantages(rewards: Tensor, std: Tensor | None = None, clip: float = 5.0) -> Tensor:
    """(reward - mean of its group) / (std + 1e-4), clipped to +-clip: fp32 [P, G] -> [P, G].

    `std` is each group's own by default; pass the batch's (a scalar, `batch_std`) to keep prompts on which all
    pictures are nearly alike from being blown up. A group of equal rewards has advantage 0. Raises ValueError for
    groups of one and for rewards that aren't finite.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"advantages compare at least 2 pictures of a prompt, got rewards of shape {tuple(rewards.shape)}"
        )
    if not torch.isfinite(rewards).all():
        raise ValueError(f"{(~torch.isfinite(rewards)).sum()} of {rewards.numel()} rewards are NaN or infinite")
    rewards = rewards.double()  # the mean of equal fp32 numbers is then exact, their advantage 0
    if std is None:
        std = rewards.std(dim=1, correction=0, keepdim=True)
    return ((rewards - rewards.mean(dim=1, keepdim=True)) / (std + EPS)).clamp(-clip, clip).float()


def batch_std(rewards: Tensor, all_reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
    """Standard deviation of all rewards of an update about their common mean, fp64 scalar.

    `rewards` are this rank's; `all_reduce` adds the sums of all ranks.
    """
    r = rewards.double()
    n, total, squares = all_reduce(torch.stack([torch.ones_like(r).sum(), r.sum(), (r**2).sum()]))
    return (squares / n - (total / n) ** 2).clamp_min(0).sqrt()
