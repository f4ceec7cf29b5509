"""What training a VAE costs: FLOPs that torch counts on tensors without data, and what a process holds of it."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vae.crops import Crops

GIB = 2**30
FP32 = 4


@lru_cache
def crop_flops(build: Callable[[], nn.Module], side: int, frames: int) -> tuple[int, int]:
    """FLOPs (forward, backward) of one crop of `frames` frames; the loss's own, of a perceptual network, aside."""
    with torch.device("meta"):
        vae = build()
        latent = (1, 16, 1 + (frames - 1) // 4, side // 8, side // 8)
        crops = Crops((torch.empty(1, 3, frames, side, side),), (torch.empty(latent),))
        with FlopCounterMode(display=False) as counter:
            ((mean, logvar, drawn),) = vae(crops)
            forward = counter.get_total_flops()
            (mean.sum() + logvar.sum() + drawn.sum()).backward()
    return forward, counter.get_total_flops() - forward


def described(build: Callable[[], nn.Module], side: int, mix: dict[int, float], batch: int) -> str:
    """Parameters, FLOPs of a step and bytes of one process alone, in lines; `mix`: {frames: share of crops}."""
    with torch.device("meta"):
        vae = build()
    trained = sum(p.numel() for p in vae.parameters() if p.requires_grad)
    every = sum(p.numel() for p in vae.parameters())
    forward, backward = (
        sum(share * crop_flops(build, side, frames)[way] for frames, share in mix.items()) * batch for way in (0, 1)
    )
    share = 100 * forward / (forward + backward)
    parts = {"weights": every, "gradients": trained, "optimizer": 2 * trained, "moving average": trained}
    held = " + ".join(f"{FP32 * count / GIB:.2g} {name}" for name, count in parts.items())
    return (
        f"trained   {trained:,} of {every:,} parameters\n"
        f"FLOPs     {forward + backward:.3g} a step: {share:.1f} % forward + {100 - share:.1f} % backward\n"
        f"memory    {FP32 * sum(parts.values()) / GIB:.2g} GiB a process: {held}; activations are not counted"
    )
