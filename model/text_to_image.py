"""Prompt (and pictures) to picture: condition encoder, MMDiT and VAE composed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from model.conditioner import REFERENCE_SIDE_PX, Conditioner, fit_area
from model.sampling.draw import Request, Sampler, Velocity
from model.sampling.guidance import Condition

if TYPE_CHECKING:
    from PIL.Image import Image

PIXELS_PER_LATENT = 8
PIXELS_PER_TOKEN = 16
DECODED_TOGETHER = 2**16
"""Elements of latents that are decoded at once: 64 pictures of 64 pixels, one of 512."""


@dataclass
class TextToImage:
    """A `Generator` of pictures by the flow."""

    velocity: Velocity
    conditioner: Conditioner
    """Or anything with its `encode`."""
    vae: Any
    """A `vae.autoencoder.VAE`, or anything with its `encode_latent` and `decode_latent`."""
    device: torch.device | str = "cpu"
    """Where `velocity` and `vae` live."""
    sampler: Sampler = field(default_factory=Sampler)
    reference_area: int = REFERENCE_SIDE_PX**2
    """Pixels that a picture to edit is resized to before the VAE sees it."""
    negative_prompt: str = " "

    def generate(
        self,
        prompts: list[str],
        sizes_px: list[tuple[int, int]],
        seeds: list[int],
        images: "list[list[Image]] | None" = None,
    ) -> list[np.ndarray]:
        """Pictures [H, W, 3] uint8 of `sizes_px` (height, width), multiples of 16; `images` are pictures to edit.

        Equal to diffusers' pipelines with `generator=torch.Generator().manual_seed(seed)`.
        """
        return self.pictures(self.requests(prompts, sizes_px, seeds, images))

    def requests(
        self,
        prompts: list[str],
        sizes_px: list[tuple[int, int]],
        seeds: list[int],
        images: "list[list[Image]] | None" = None,
    ) -> list[Request]:
        """What `generate` draws from: every prompt encoded once."""
        noise = [initial_noise(size, seed) for size, seed in zip(sizes_px, seeds, strict=True)]
        return [Request(c, n) for c, n in zip(self.encode(prompts, images), noise, strict=True)]

    def pictures(self, requests: list[Request]) -> list[np.ndarray]:
        """uint8 pictures [H, W, 3] of requests."""
        return [to_uint8(picture) for picture in self.decode(self.latents(requests))]

    def latents(self, requests: list[Request]) -> list[Tensor]:
        """Latents [16, 1, H/8, W/8] of requests."""
        return self.sampler.draw(self.velocity, requests).latents

    def encode(self, prompts: list[str], images: "list[list[Image]] | None" = None) -> list[Condition]:
        """Conditions of the prompts, with those of the negative prompt under guidance and the latents of pictures."""
        images = images or [[] for _ in prompts]
        texts = self.conditioner.encode(prompts, images)
        negatives = [None] * len(prompts)
        if self.sampler.cfg_scale > 1:
            negatives = self.conditioner.encode([self.negative_prompt] * len(prompts), images)
        move = lambda t: None if t is None else t.to(self.device)  # noqa: E731
        return [
            Condition(move(txt), move(negative), tuple(map(self.encode_reference, pictures)))
            for txt, negative, pictures in zip(texts, negatives, images, strict=True)
        ]

    @torch.no_grad()
    def encode_reference(self, picture: "Image") -> Tensor:
        """Latent [16, 1, h, w] of a picture to edit, resized to about `reference_area`, encoded alone."""
        from PIL.Image import Resampling

        resized = picture.convert("RGB").resize(fit_area(*picture.size, self.reference_area), Resampling.LANCZOS)
        return self.vae.encode_latent(_pixels(np.asarray(resized)).to(self.device))[0].float()

    @torch.no_grad()
    def decode(self, latents: list[Tensor]) -> Iterator[Tensor]:
        """Pictures [3, H, W] in [-1, 1], fp32, of latents [16, 1, h, w]; small ones of one size together."""
        for _, alike in groupby(latents, lambda latent: latent.shape):
            alike = list(alike)
            together = max(1, DECODED_TOGETHER // alike[0].numel())
            for start in range(0, len(alike), together):
                yield from self.vae.decode_latent(torch.stack(alike[start : start + together]))[:, :, 0].float()

    @torch.no_grad()
    def reconstruct(self, picture: np.ndarray) -> np.ndarray:
        """A picture, uint8 [H, W, 3], through the VAE and back: the best that any latent gives."""
        (decoded,) = self.decode([self.vae.encode_latent(_pixels(picture).to(self.device))[0].float()])
        return to_uint8(decoded)


def _pixels(picture: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> [1, 3, 1, H, W] in [-1, 1]."""
    return 2 * torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)[None, :, None] - 1


def to_uint8(picture: Tensor) -> np.ndarray:
    """Picture [3, H, W] in [-1, 1] -> [H, W, 3] uint8, rounded."""
    return ((picture / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().numpy() * 255).round().astype("uint8")


def initial_noise(size_px: tuple[int, int], seed: int) -> Tensor:
    """Standard normal latent [16, 1, H/8, W/8] of a picture of (height, width) pixels, a function of its seed alone."""
    if any(side < PIXELS_PER_TOKEN or side % PIXELS_PER_TOKEN for side in size_px):
        raise ValueError(f"a picture of {size_px[0]} x {size_px[1]} pixels: both sides must be multiples of 16")
    shape = (16, 1, size_px[0] // PIXELS_PER_LATENT, size_px[1] // PIXELS_PER_LATENT)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
