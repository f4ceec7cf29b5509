"""Kinds of samples whose losses are logged apart: by noise level, by size of the picture, by source."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.text_to_image import PIXELS_PER_LATENT

BANDS = (0.0, 0.3, 0.6, 0.8, 0.9, 1.0)
"""Ends of the bands of noise levels that are averaged apart."""
SOURCE = "source/"
"""Before the names of kinds by source, of which a user's records may have any number."""


@dataclass(frozen=True)
class Kinds:
    """Which samples of a microbatch are of which kind."""

    names: tuple[str, ...]
    counts: tuple[int, ...]
    member: Tensor
    """bool [kinds, n]"""

    def sums(self, losses: Tensor) -> Tensor:
        """Sum of the losses [n] of each kind, fp64 [kinds]; one that is not finite stays with its own kinds."""
        return torch.where(self.member, losses, 0).double().sum(1)


def kinds_of(batch: Sequence[Any], inputs: Any) -> Kinds | None:
    """The kinds of a microbatch of samples, or of items that hold one; None of anything else."""
    samples = [getattr(item, "win", getattr(item, "sample", item)) for item in batch]
    if not hasattr(inputs, "sigma") or not all(hasattr(sample, "latent") for sample in samples):
        return None
    members: dict[str, list[int]] = {}
    for i, (sample, sigma) in enumerate(zip(samples, inputs.sigma.tolist(), strict=False)):
        band = sum(sigma > end for end in BANDS[1:-1])
        height, width = (PIXELS_PER_LATENT * side for side in sample.latent.shape[-2:])
        kinds = [f"sigma/{BANDS[band]:g}-{BANDS[band + 1]:g}", f"size/{width}x{height}"]
        if source := sample.meta.get("source"):
            kinds.append(f"{SOURCE}{source}")
        for kind in kinds:
            members.setdefault(kind, []).append(i)
    member = torch.zeros(len(members), len(samples), dtype=torch.bool)
    for row, own in zip(member, members.values(), strict=True):
        row[own] = True
    return Kinds(tuple(members), tuple(map(len, members.values())), member)
