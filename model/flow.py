"""Rectified flow, in one time convention: the scheduler's.

    x_sigma = (1 - sigma) * x0 + sigma * eps,   v = dx/dsigma = eps - x0,   sampling runs from sigma = 1 to 0.

(The Qwen-Image report's Eq. 1 puts data at t = 1 instead; its t is our 1 - sigma.)
"""

import math

import torch
from torch import Tensor

BASE_TOKENS, MAX_TOKENS, BASE_SHIFT, MAX_SHIFT = 256, 8192, 0.5, 0.9


def interpolate(x0: Tensor, eps: Tensor, sigma: Tensor | float) -> Tensor:
    """x_sigma; sigma broadcasts against x0."""
    return (1 - sigma) * x0 + sigma * eps


def velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """The regression target v = eps - x0."""
    return eps - x0


def predict_x0(x: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    """Clean latent implied by a velocity at x_sigma."""
    return x - sigma * v


def resolution_mu(image_tokens: int) -> float:
    """Exponent of the schedule's shift for a picture of so many tokens: .5 at 256, .9 at 8192, linear between."""
    slope = (MAX_SHIFT - BASE_SHIFT) / (MAX_TOKENS - BASE_TOKENS)
    return BASE_SHIFT + slope * (image_tokens - BASE_TOKENS)


def shift_sigma(sigma: Tensor, mu: float | Tensor) -> Tensor:
    """Move noise levels towards 1: exp(mu) / (exp(mu) + 1/sigma - 1) (SD3, arXiv 2403.03206, Eq. 23)."""
    e = torch.exp(torch.as_tensor(mu, dtype=sigma.dtype))
    return e * sigma / (1 + (e - 1) * sigma)


def logit_normal(z: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Noise level from a standard normal z: sigmoid(mean + std * z) (SD3, arXiv 2403.03206, section 3.1)."""
    return torch.sigmoid(mean + std * z)


def mode_density(u: Tensor, scale: float = 1.29) -> Tensor:
    """Noise level from a uniform u by SD3's mode sampling: 1 - u - s (cos^2(pi u / 2) - 1 + u)."""
    return 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
