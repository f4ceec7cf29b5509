"""Random weights that a VAE learns quickly from.

It starts as a VAE for single pictures: temporal taps are zero but for the last, and convolutions over time pass frames
on unchanged, so a clip is first seen frame by frame. Residual branches start at half the usual scale.
"""

import hashlib

import torch
from torch import Tensor


def initial_weight(name: str, shape: torch.Size, seed: int) -> Tensor:
    """A parameter's first values, a function of (seed, name): zero biases, unit norms, uniform 1 / sqrt(fan-in)."""
    weight = torch.zeros(shape)
    if name.endswith("bias"):
        return weight
    if name.endswith("gamma"):
        return weight + 1.0
    if "time_conv" in name:
        weight[:, :, -1, 0, 0] = torch.eye(shape[1]).repeat(shape[0] // shape[1], 1)
        return weight
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    taps = weight[:, :, -1] if weight.ndim == 5 else weight
    bound = (3 / taps[0].numel()) ** 0.5
    taps.copy_((torch.rand(taps.shape, generator=generator) * 2 - 1) * bound)
    return weight * 0.5 if name.endswith(("conv2.weight", "proj.weight")) else weight
