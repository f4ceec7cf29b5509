"""Prompt (and pictures) to picture: condition encoder, MMDiT and VAE composed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from model.conditioner import Conditioner, fit_area
from model.sampling.sampler import Condition, Velocity, sample

if TYPE_CHECKING:
    from PIL.Image import Image

PIXELS_PER_LATENT = 8
PIXELS_PER_TOKEN = 16


@dataclass
class TextToImage:
    """Draws pictures. A picture is a function of its own prompt, pictures, size and seed, whatever else is drawn."""

    velocity: Velocity
    conditioner: Conditioner
    vae: Any
    """A `vae.autoencoder.VAE`, or anything with its `encode_latent` and `decode_latent`."""
    device: torch.device | str = "cpu"
    """Where `velocity` and `vae` live."""
    reference_area: int = 1024 * 1024
    """Pixels that a picture to edit is resized to before the VAE sees it."""
    tokens_per_pack: int = 16384
    """Pictures run together up to so many tokens."""
    align: int = 16

    def generate(
        self,
        prompts: list[str],
        sizes_px: list[tuple[int, int]],
        seeds: list[int],
        steps: int = 50,
        cfg_scale: float = 4.0,
        images: "list[list[Image]] | None" = None,
        negative_prompt: str = " ",
    ) -> list[np.ndarray]:
        """Pictures [H, W, 3] uint8 of `sizes_px` (height, width), multiples of 16; `images` are pictures to edit.

        Equal to diffusers' pipelines with `generator=torch.Generator().manual_seed(seed)`.
        """
        latents = self.draw(prompts, sizes_px, seeds, steps, cfg_scale, images, negative_prompt)
        return [to_uint8(self.decode(latent)) for latent in latents]

    def draw(
        self,
        prompts: list[str],
        sizes_px: list[tuple[int, int]],
        seeds: list[int],
        steps: int = 50,
        cfg_scale: float = 4.0,
        images: "list[list[Image]] | None" = None,
        negative_prompt: str = " ",
    ) -> list[Tensor]:
        """Latents [16, 1, H/8, W/8] of the pictures that `generate` decodes."""
        noise = [initial_noise(size, seed) for size, seed in zip(sizes_px, seeds, strict=True)]
        conditions = self.encode(prompts, images, negative_prompt if cfg_scale > 1 else None)
        latents = []
        for batch in self._batches(conditions, noise):
            start = [noise[i].to(self.device) for i in batch]
            latents += sample(self.velocity, [conditions[i] for i in batch], start, steps, cfg_scale, self.align)
        return latents

    def encode(
        self, prompts: list[str], images: "list[list[Image]] | None" = None, negative_prompt: str | None = " "
    ) -> list[Condition]:
        """Conditions of the prompts, with those of the negative prompt (if any) and the latents of the pictures."""
        images = images or [[] for _ in prompts]
        texts = self.conditioner.encode(prompts, images)
        negatives = [None] * len(prompts)
        if negative_prompt is not None:
            negatives = self.conditioner.encode([negative_prompt] * len(prompts), images)
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
        pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255).permute(2, 0, 1)[None, :, None]
        return self.vae.encode_latent((2 * pixels - 1).to(self.device))[0].float()

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Picture [3, H, W] in [-1, 1], fp32, of a latent [16, 1, h, w]."""
        return self.vae.decode_latent(latent[None])[0, :, 0].float()

    def _batches(self, conditions: list[Condition], noise: list[Tensor]) -> Iterator[list[int]]:
        """Consecutive pictures that fit into one pack."""
        latents = lambda c, n: n.numel() + sum(r.numel() for r in c.references)  # noqa: E731
        cost = [latents(c, n) // 64 + len(c.txt) for c, n in zip(conditions, noise, strict=True)]
        group, used = [], 0
        for i, tokens in enumerate(cost):
            if group and used + tokens > self.tokens_per_pack:
                yield group
                group, used = [], 0
            group.append(i)
            used += tokens
        if group:
            yield group


def to_uint8(picture: Tensor) -> np.ndarray:
    """Picture [3, H, W] in [-1, 1] -> [H, W, 3] uint8, rounded."""
    return ((picture / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().numpy() * 255).round().astype("uint8")


def initial_noise(size_px: tuple[int, int], seed: int) -> Tensor:
    """Standard normal latent [16, 1, H/8, W/8] of a picture of (height, width) pixels, a function of its seed alone."""
    if any(side < PIXELS_PER_TOKEN or side % PIXELS_PER_TOKEN for side in size_px):
        raise ValueError(f"a picture of {size_px[0]} x {size_px[1]} pixels: both sides must be multiples of 16")
    shape = (16, 1, size_px[0] // PIXELS_PER_LATENT, size_px[1] // PIXELS_PER_LATENT)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
