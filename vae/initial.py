"""Random weights that a VAE learns quickly from: it starts as a blurred thumbnail, and learns detail from there.

Seven channels of the main path carry +colour, -colour and a constant: both signs, because silu(x) - silu(-x) = x, and a
constant, because it keeps the norms before the output convolutions near to linear. Downsampling averages them,
upsampling interpolates, and three latent channels hold the mean colour of each cell. Residual branches start at zero.
Temporal taps are zero but for the last, and convolutions over time pass frames on unchanged, so a clip is first seen
frame by frame. All else is small and random, a function of (seed, parameter name).
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from vae.layers import Attention, CausalConv3d, Downsample, ResidualBlock, Upsample

CARRIED = 7
"""+red, +green, +blue, -red, -green, -blue, constant."""
CONSTANT = 3.0
OTHERS, OUTPUTS = 0.3, 0.05
"""Scale of all other weights of the main path and of the output convolutions; 1 would keep their inputs' variance."""
LOG_VARIANCE = -6.0
"""Of posteriors: narrow, so that noise does not hide what is to be learned first."""


@torch.no_grad()
def initialize(vae: nn.Module, seed: int) -> None:
    """Fill the weights of a `vae.autoencoder.VAE` as this file says."""
    for name, param in vae.named_parameters():
        param.fill_(1.0 if name.endswith("gamma") else 0.0)
        if param.ndim >= 4 and not name.endswith("gamma"):
            taps = _last(param)
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            bound = math.sqrt(3 / taps[0].numel())
            taps.copy_((torch.rand(taps.shape, generator=generator) * 2 - 1) * bound)
    averaging, smoothing = torch.zeros(3, 3), torch.tensor([0.25, 0.5, 0.25])
    averaging[:2, :2] = 0.25
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            module.conv2.weight.zero_()
            if module.conv_shortcut is not None:
                _carry(module.conv_shortcut, torch.ones(1, 1))
        elif isinstance(module, Attention):
            module.proj.weight.zero_()
        elif isinstance(module, Downsample):
            _carry(module.resample[1], averaging)
        elif isinstance(module, Upsample):
            _carry(module.resample[1], torch.outer(smoothing, smoothing))
        if isinstance(module, Downsample | Upsample) and module.time_conv is not None:
            weight = module.time_conv.weight
            weight.zero_()[:, :, -1, 0, 0] = torch.eye(weight.shape[1]).repeat(len(weight) // weight.shape[1], 1)
    for net in (vae.encoder, vae.decoder):
        _enter(net.conv_in)
        _leave(net.conv_out)
    z = vae.config.z_dim
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.zero_()[:z, :z, 0, 0, 0] = torch.eye(z)
    vae.quant_conv.bias[z:] = LOG_VARIANCE


def _last(weight: Tensor) -> Tensor:
    return weight[:, :, -1] if weight.ndim == 5 else weight


def _carry(conv: nn.Conv2d | CausalConv3d, kernel: Tensor) -> None:
    """Pass the carried channels through `kernel`."""
    weight = _last(conv.weight)
    weight *= OTHERS
    weight[:CARRIED] = 0.0
    for i in range(min(CARRIED, weight.shape[0], weight.shape[1])):
        weight[i, i] = kernel


def _enter(conv: CausalConv3d) -> None:
    """Spread the first three channels over the carried ones."""
    weight = _last(conv.weight)
    weight *= OTHERS
    weight[:CARRIED] = 0.0
    for i in range(min(3, weight.shape[0] - 3)):
        weight[i, i, 1, 1], weight[i + 3, i, 1, 1] = 1.0, -1.0
    conv.bias[CARRIED - 1 : CARRIED] = CONSTANT


def _leave(conv: CausalConv3d) -> None:
    """Collect the carried channels, which a norm made small, in the first three."""
    weight = _last(conv.weight)
    weight *= OUTPUTS
    weight[:3] = 0.0
    scale = math.sqrt((2 + CONSTANT**2) / weight.shape[1])
    for i in range(min(3, weight.shape[1] - 3)):
        weight[i, i, 1, 1], weight[i, i + 3, 1, 1] = scale, -scale
