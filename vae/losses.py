"""Terms of the VAE's training loss, each a number per sample."""

from torch import Tensor


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
    return main + ratio * main.detach() / other.detach().clamp_min(1e-6) * other
