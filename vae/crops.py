"""What a VAE trains on: square crops of pictures at varied scales, and clips that move over them.

Everything drawn is a function of (seed, epoch, key). Shape legend: B samples, T frames, S side of a crop in pixels.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Randomness(Protocol):
    """Numbers that are a function of (seed, epoch, key, purpose), as `training.randomness` has them."""

    def uniform(self, key: str, epoch: int, purpose: str, shape: tuple[int, ...]) -> Tensor: ...

    def normal(self, key: str, epoch: int, purpose: str, shape: tuple[int, ...]) -> Tensor: ...


@dataclass(frozen=True)
class Source:
    """A picture, or a stretch of a video, that crops are cut from."""

    key: str
    frames: Tensor
    """uint8 [n, 3, H, W]"""
    length: int
    """Frames of the crop: 1 for a picture; with one frame given and more wanted, the crop moves over it."""
    epoch: int = 0


@dataclass(frozen=True)
class Crops:
    """One microbatch: crops of equal shape together, in [-1, 1], with the noise of their posterior samples."""

    pixels: tuple[Tensor, ...]
    """[B, 3, T, S, S], a tensor for each T."""
    noise: tuple[Tensor, ...]
    """[B, 16, F, S/8, S/8]"""
    flops: int = 0
    """Of one forward and backward pass; 0 if nobody counted them."""


def draw_crop(source: Source, rng: Randomness, side: int, least_area: int) -> Tensor:
    """A crop [3, T, side, side] in [-1, 1], at a scale between the source's own and that of area least_area^2.

    The scale is log-uniform; a source smaller than the crop is enlarged.
    """
    n, _, height, width = source.frames.shape
    draw = rng.uniform(source.key, source.epoch, "crop", (9,)).tolist()
    smallest = max(side / min(height, width), min(1.0, least_area / math.sqrt(height * width)))
    scale = smallest ** draw[0] if smallest < 1 else smallest
    moves = n == 1 and source.length > 1
    margin = 1.5 if moves else 1.0
    box = min(round(margin * side / scale), height, width)
    top, left = (int(u * (room + 1)) for u, room in zip(draw[1:3], (height - box, width - box), strict=True))
    frames = source.frames[:, :, top : top + box, left : left + box].float()
    work = max(side, round(box * scale))
    if box != work:
        frames = F.interpolate(frames, (work, work), mode="bicubic", antialias=True, align_corners=False)
    frames = frames.clamp(0, 255) / 127.5 - 1
    if moves:
        frames = move(frames, source.length, side, draw[3:])
    return frames.transpose(0, 1)


def move(picture: Tensor, length: int, side: int, draw: list[float]) -> Tensor:
    """A window that pans, zooms and turns over a picture: [1, 3, h, h] -> [length, 3, side, side].

    `draw`: six numbers in [0, 1) that decide the first and last position, the zoom and the turn.
    """
    room = 1 - side / picture.shape[-1]
    t = torch.linspace(0, 1, length)
    x, y = (((2 * a - 1) * (1 - t) + (2 * b - 1) * t) * room for a, b in (draw[0:2], draw[2:4]))
    zoom = side / picture.shape[-1] * torch.exp(0.3 * (draw[4] - 0.5) * t)
    turn = 0.5 * (draw[5] - 0.5) * t
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    theta = torch.stack([torch.stack([cos, -sin, x], -1), torch.stack([sin, cos, y], -1)], dim=1)
    grid = F.affine_grid(theta, [length, 3, side, side], align_corners=False)
    frames = picture.expand(length, -1, -1, -1)
    return F.grid_sample(frames, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(-1, 1)


def whole_picture(source: Source, side: int) -> Tensor:
    """All of a picture [1, 3, 1, h, w] in [-1, 1], at about the area of side x side, h and w multiples of 8."""
    height, width = source.frames.shape[-2:]
    scale = side / math.sqrt(height * width)
    size = tuple(max(8, round(s * scale / 8) * 8) for s in (height, width))
    pixels = F.interpolate(source.frames[:1].float(), size, mode="bicubic", antialias=True, align_corners=False)
    return pixels.clamp(0, 255)[:, :, None] / 127.5 - 1
