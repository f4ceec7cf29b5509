"""An update from gradients that a test has put into `main_grad`, in place of a backward pass."""

import torch


def update(engine) -> dict[str, float]:
    """`Engine.update` for a batch of weight 1."""
    engine.health.begin()
    engine.health.reduced(engine.health.losses())
    zero = torch.zeros((), dtype=torch.float64)
    return engine.update({"_flops": zero, "_loss": zero, "_tokens": zero, "_weight": zero + 1})
