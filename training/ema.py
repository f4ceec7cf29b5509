"""Moving averages of weights, in fp32."""

from collections.abc import Callable

import torch
from torch import Tensor


def ramped(decay: float) -> Callable[[int], float]:
    """min(decay, (1 + n) / (10 + n)) at update n: the first, random weights do not weigh on short runs.

    Raises ValueError for a decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"the decay of a moving average lies in [0, 1), got {decay}")
    return lambda n: min(decay, (1 + n) / (10 + n))


class MovingAverage:
    """avg <- d(n) avg + (1 - d(n)) weight after update n of the weights, counted from 0, if `every` divides n + 1.

    `weights` are the tensors to follow, by any hashable name; under a sharded optimizer those are this rank's slices of
    the fp32 masters.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        decay: Callable[[int], float],
        every: int = 1,
        device: torch.device | None = None,
    ):
        """`device` holds the averages; by default each lies beside its weight."""
        self.weights, self.decay, self.every, self.updates = weights, decay, every, 0
        self.average = {name: torch.empty_like(w, dtype=torch.float32, device=device) for name, w in weights.items()}
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start over from the present weights."""
        self.updates = 0
        for name, weight in self.weights.items():
            self.average[name].copy_(weight)

    @torch.no_grad()
    def update(self) -> None:
        """Say that the weights were updated."""
        decay = self.decay(self.updates)
        self.updates += 1
        if self.updates % self.every:
            return
        beside = [name for name, average in self.average.items() if average.device == self.weights[name].device]
        if beside:
            weights = [self.weights[name].float() for name in beside]
            torch._foreach_lerp_([self.average[name] for name in beside], weights, 1 - decay)
        for name in self.average.keys() - set(beside):
            self.average[name].lerp_(self.weights[name].to(self.average[name]), 1 - decay)
