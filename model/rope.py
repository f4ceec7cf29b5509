"""MSRoPE: multimodal scalable rotary position embedding (Qwen-Image report, section 2.3 and Figure 8).

Each token has a position on three axes (frame, height, width). Image axes are centred, so that a larger picture
extends the same coordinates outwards; text continues along the diagonal, where all three coordinates are equal.
For ablations there are the two schemes that the report compares with: `text-first`, plain RoPE whose images start at
their corner behind the prompt, and `scaling`, centred images with the prompt as one more row of them.

Shape legend: L tokens, H heads, K head dim.
"""

from functools import lru_cache

import torch
from torch import Tensor

MAX_POSITION = 4096
"""Positions lie in [-4096, 4096), as in the reference's tables."""


def image_positions(frames: int, height: int, width: int, index: int) -> Tensor:
    """Positions [frames * height * width, 3] of one image or clip, in tokens.

    `index` is the frame index of its first frame: 0 for the target, 1, 2, ... for references. Height runs from
    -(height - height // 2) to height // 2 - 1, width likewise.
    """
    if min(frames, height, width) < 1:
        raise ValueError(f"an image needs at least one token a side, got {frames} x {height} x {width}")
    if max(height, width) > 2 * MAX_POSITION or index + frames > MAX_POSITION:
        raise ValueError(f"{frames} x {height} x {width} tokens (frame index {index}) exceed the RoPE range of 4096")
    axes = (
        torch.arange(index, index + frames),
        torch.arange(height) - (height - height // 2),
        torch.arange(width) - (width - width // 2),
    )
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def sample_positions(txt: int, sizes: list[tuple[int, int, int]], scheme: str) -> tuple[Tensor, list[Tensor]]:
    """Positions of a prompt [txt, 3] and of each image of its sample, target first; `sizes` (frames, height, width)."""
    images = [image_positions(*size, index=i) for i, size in enumerate(sizes)]
    text = text_positions(txt, sizes)
    if scheme == "text-first":
        corners = [torch.tensor([0, h - h // 2, w - w // 2]) for _, h, w in sizes]
        images = [image + corner + txt for image, corner in zip(images, corners, strict=True)]
        text = torch.arange(txt)[:, None].expand(txt, 3)
        if any(image.max() >= MAX_POSITION for image in images):
            raise ValueError(f"images behind a text of {txt} tokens end past position {MAX_POSITION}")
    elif scheme == "scaling":
        text = text * torch.tensor([0, 0, 1])
    return text, images


def text_positions(length: int, image_sizes: list[tuple[int, int, int]]) -> Tensor:
    """Positions [length, 3] of a prompt; `image_sizes` are the (frames, height, width) of all images of the sample."""
    start = max(max(h // 2, w // 2) for _, h, w in image_sizes)
    if start + length > MAX_POSITION:
        raise ValueError(
            f"a text of {length} tokens beside an image of {2 * start} tokens a side ends past position {MAX_POSITION}"
        )
    return torch.arange(start, start + length)[:, None].expand(length, 3)


def rope_table(positions: Tensor, axes_dims: tuple[int, int, int], theta: float = 10000.0) -> Tensor:
    """(cos, sin), fp32 [L, K/2, 2], for positions [L, 3]; the K/2 pairs are split over the axes by `axes_dims`."""
    tables = _axis_tables(tuple(axes_dims), theta, positions.device)
    return torch.cat([table[positions[:, axis] + MAX_POSITION] for axis, table in enumerate(tables)], dim=1)


@lru_cache(maxsize=8)
def _axis_tables(axes_dims: tuple[int, ...], theta: float, device: torch.device) -> list[Tensor]:
    """For each axis, (cos, sin) [2 * 4096, dim/2, 2] of every position."""
    positions = torch.arange(-MAX_POSITION, MAX_POSITION, dtype=torch.float32)
    tables = []
    for dim in axes_dims:
        angle = torch.outer(positions, 1.0 / torch.pow(theta, torch.arange(0, dim, 2, dtype=torch.float32).div(dim)))
        tables.append(torch.stack((angle.cos(), angle.sin()), dim=-1).to(device))
    return tables


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of x [L, H, K] by the table's angles, in fp32; returns x's dtype."""
    cos, sin = table[:, None].unbind(-1)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
