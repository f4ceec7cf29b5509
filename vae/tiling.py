"""Large pictures and clips in bounded memory: overlapping tiles, one at a time, blended where they overlap.

The rule is that of diffusers' `enable_tiling`: tiles start every `stride` pixels, and in an overlap the weight moves
linearly from the upper or left tile to the next, first down, then across. A tile does not see what lies outside it, so
the result differs a little from that of the whole picture, in ways that reward models pick up: never score tiled ones.

Shape legend: tensors end in [H, W]; a cell is one latent position, 8 x 8 pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Side and distance of tiles in pixels, multiples of 8; the defaults are diffusers'. ValueError for others."""

    side: int = 256
    stride: int = 192

    def __post_init__(self):
        if self.side % 8 or self.stride % 8 or not 0 < self.stride <= self.side:
            raise ValueError(f"tiles need a side and a stride, multiples of 8, stride <= side; got {self}")

    def apply(self, function: Callable[[Tensor], Tensor], x: Tensor, cell_in: int, cell_out: int) -> Tensor:
        """`function`, which maps `cell_in` to `cell_out` positions per cell (8 and 1: encoding), tile by tile."""
        side, stride = self.side // 8, self.stride // 8
        tops, lefts = (range(0, size, stride * cell_in) for size in x.shape[-2:])
        kept, overlap = stride * cell_out, (side - stride) * cell_out
        rows, above = [], []
        for top in tops:
            row, below, before = [], [], None
            for column, left in enumerate(lefts):
                tile = function(x[..., top : top + side * cell_in, left : left + side * cell_in])
                if above:
                    tile = blend(above[column], tile, overlap, -2)
                if before is not None:
                    tile = blend(before, tile, overlap, -1)
                row.append(tile[..., :kept, :kept].clone())
                below.append(tile[..., kept:, :].clone())
                before = tile[..., kept:].clone()
            rows.append(torch.cat(row, dim=-1))
            above = below
        return torch.cat(rows, dim=-2)


def blend(before: Tensor, after: Tensor, overlap: int, dim: int) -> Tensor:
    """`after`, whose first positions along `dim` fade in from the last ones of `before`."""
    extent = min(before.shape[dim], after.shape[dim], overlap)
    weight = torch.arange(extent, device=after.device, dtype=after.dtype) / max(1, extent)
    weight = weight.view(-1, *[1] * (-dim - 1))
    old = before.narrow(dim, before.shape[dim] - extent, extent)
    new, rest = after.split((extent, after.shape[dim] - extent), dim)
    return torch.cat([torch.lerp(old, new, weight), rest], dim)
