"""One model twice: ours, and diffusers' with the same weights."""

from dataclasses import asdict

import torch
from diffusers import QwenImageTransformer2DModel

from model.config import MMDiTConfig
from model.diffusers_io.names import to_diffusers
from model.mmdit import MMDiT


def twins(config: MMDiTConfig, dtype: torch.dtype) -> tuple[MMDiT, QwenImageTransformer2DModel]:
    """(ours, theirs) on torch's default device, with equal random weights."""
    ours = MMDiT(config).to(dtype)
    for param in ours.parameters():
        torch.nn.init.normal_(param, std=0.02)
    theirs = QwenImageTransformer2DModel(**{k: v for k, v in asdict(config).items() if k != "rope"}).to(dtype)
    theirs.load_state_dict({to_diffusers(n): p.detach() for n, p in ours.named_parameters()})
    return ours, theirs
