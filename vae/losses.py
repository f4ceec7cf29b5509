"""What a reconstruction is judged by while a VAE trains. Each perceptual loss maps (x, y) [N, 3, H, W] in [-1, 1] to [N].

`GradientPyramid` needs no weights: it compares edges at several scales and knows nothing of objects. `LPIPS` and
`ConvNeXtFeatures` are learned and read local files.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GradientPyramid(nn.Module):
    """Mean absolute difference of horizontal and vertical finite differences, averaged over octaves."""

    def __init__(self, octaves: int = 3):
        super().__init__()
        self.octaves = octaves

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        error, total = x - y, torch.zeros(len(x), device=x.device)
        for octave in range(self.octaves):
            if octave:
                error = F.avg_pool2d(error, 2)
            for step in (error.diff(dim=-1), error.diff(dim=-2)):
                total = total + step.abs().flatten(1).mean(1)
        return total / (2 * self.octaves)


def per_sample_mean(x: Tensor) -> Tensor:
    """Mean over everything but the first dimension."""
    return x.flatten(1).mean(1)


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)), mean over a sample's elements: [B, ...] -> [B]."""
    return per_sample_mean(0.5 * (mean.square() + logvar.exp() - 1.0 - logvar))


def balanced(main: Tensor, other: Tensor, ratio: float) -> Tensor:
    """main + w * other with w = ratio * main / other of each sample, w not differentiated: [B], [B] -> [B].

    So `other` weighs `ratio` times `main` at every moment, whatever their scales: the gradient is
    main * (grad log main + ratio * grad log other).
    """
    weight = ratio * main.detach() / other.detach().clamp_min(1e-6)
    return main + weight * other
