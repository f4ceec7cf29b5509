"""Latent mean and std per channel, which make latents of a VAE trained from scratch unit-sized for diffusion."""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vae.crops import Source, whole_picture

if TYPE_CHECKING:
    from vae.autoencoder import VAE


@torch.no_grad()
def measure(vae: "VAE", pictures: Iterable[Source], side: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel of the posterior modes of pictures shrunk to about the area of side x side pixels.

    Raises ValueError if a channel does not vary.
    """
    count, total, squares = 0, 0.0, 0.0
    for picture in pictures:
        z = vae.moments(whole_picture(picture, side))[0].double().flatten(2)[0]
        count, total, squares = count + z.shape[1], total + z.sum(1), squares + z.square().sum(1)
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    if not (std > 1e-6).all():
        raise ValueError("a latent channel is constant: the VAE has not learned to use it; train longer")
    return tuple(round(m, 6) for m in mean.tolist()), tuple(round(s, 6) for s in std.tolist())


def with_measured_statistics(vae: "VAE", pictures: Iterable[Source], side: int) -> "VAE":
    """The same VAE with the statistics of these pictures in its config."""
    mean, std = measure(vae, pictures, side)
    vae.config = replace(vae.config, latents_mean=mean, latents_std=std)
    return vae
