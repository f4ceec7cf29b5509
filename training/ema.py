"""Moving average of weights, in fp32."""

import torch
from torch import Tensor


class EMA:
    """avg <- d * avg + (1 - d) * weight with d = min(decay, (1 + n) / (10 + n)) at update n.

    The ramp keeps the first, random weights from weighing on short runs. `weights` are the tensors to follow, by any
    hashable name; under a sharded optimizer those are this rank's slices of the fp32 masters.
    """

    def __init__(self, weights: dict[str, Tensor], decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of a moving average lies in [0, 1), got {decay}")
        self.weights, self.decay, self.updates = weights, decay, 0
        self.average = {name: torch.empty_like(w, dtype=torch.float32) for name, w in weights.items()}
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start over from the present weights."""
        self.updates = 0
        for name, weight in self.weights.items():
            self.average[name].copy_(weight)

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        weights = [self.weights[name].float() for name in self.average]
        if weights:
            torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)
