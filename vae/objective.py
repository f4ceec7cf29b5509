"""The VAE's training objective: reconstruction, perceptual and KL terms of crops."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from vae.crops import Crops, Randomness, Source, draw_crop
from vae.losses import balanced, kl, per_sample_mean
from vae.perceptual import GradientPyramid


@dataclass(frozen=True)
class Reconstruction:
    """(|x - y| + (x - y)^2) (+) ratio * perceptual + kl_weight * KL of each crop, mean over its elements.

    (+) is `losses.balanced`: the perceptual term always weighs `perceptual_ratio` times the reconstruction term.
    """

    crop: int = 256
    """Side of crops in pixels."""
    least_area: int = 256
    """Pictures are shrunk at most to the area of this square before they are cut."""
    perceptual_ratio: float = 0.5
    kl_weight: float = 1e-6
    sample_posterior: bool = True
    """Decode a sample of the posterior (while the encoder learns) or its mode."""
    perceptual: nn.Module = field(default_factory=GradientPyramid)
    flops: Callable[[int], int] = lambda frames: 0
    """Of a crop of so many frames, forward and backward, for the log."""

    frozen = MappingProxyType({})

    def prepare(self, batch: list[Source], rng: Randomness, align: int) -> tuple[Crops, None]:
        groups: dict[int, list[Tensor]] = {}
        noise: dict[int, list[Tensor]] = {}
        for source in batch:
            crop = draw_crop(source, rng, self.crop, self.least_area)
            frames = crop.shape[1]
            shape = (16, 1 + (frames - 1) // 4, self.crop // 8, self.crop // 8)
            groups.setdefault(frames, []).append(crop)
            noise.setdefault(frames, []).append(
                rng.normal(source.key, source.epoch, "posterior", shape)
                if self.sample_posterior
                else torch.zeros(shape)
            )
        pixels, start = (tuple(torch.stack(g[t]) for t in sorted(g)) for g in (groups, noise))
        return Crops(pixels, start, sum(len(crops) * self.flops(t) for t, crops in groups.items())), None

    def loss(self, model: Callable[[Crops], list[tuple[Tensor, ...]]], frozen: Any, inputs: Crops, aux: None):
        sums: dict[str, Tensor] = {}
        for (mean, logvar, y), x in zip(model(inputs), inputs.pixels, strict=True):
            error = (y - x).float()
            l1, mse = per_sample_mean(error.abs()), per_sample_mean(error.square())
            frames = lambda p: p.float().transpose(1, 2).flatten(0, 1)  # noqa: E731
            perceptual = self.perceptual(frames(y), frames(x)).view(len(x), -1).mean(1)
            divergence = kl(mean.float(), logvar.float())
            total = balanced(l1 + mse, perceptual, self.perceptual_ratio) + self.kl_weight * divergence
            psnr = -10 * torch.log10(mse.detach() / 4 + 1e-10)
            terms = {"loss": total, "l1": l1, "perceptual": perceptual, "kl": divergence, "psnr": psnr}
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.sum()
        return sums["loss"], float(sum(map(len, inputs.pixels))), {name: value.detach() for name, value in sums.items()}
