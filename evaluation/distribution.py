"""How far a set of pictures is from a set of real ones: FID (arXiv 1706.08500) and KID (arXiv 1801.01401).

Both by torchmetrics on features of the original Inception network, given as TorchScript file (`inception-2015-12-05.pt`
as StyleGAN's authors ship it). FID is biased for small sets: compare equal numbers only, and KID for fewer than some
thousand pictures.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from command_line import UserError

BATCH = 32
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
"""Subsets that KID is the mean over, and their size (StyleGAN's); fewer than twice as many pictures are halved."""


class _Features(nn.Module):
    """TorchScript Inception: uint8 [B, 3, H, W] -> [B, 2048]."""

    num_features = 2048

    def __init__(self, file: Path):
        super().__init__()
        if not file.is_file():
            raise UserError(f"no Inception network at {file}")
        try:
            self.net = torch.jit.load(file, map_location="cpu").eval()
        except RuntimeError as error:
            raise UserError(f"{file} is no TorchScript file ({str(error).splitlines()[0]})") from None

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images, return_features=True)


def distances(drawn: Iterable[np.ndarray], real: Iterable[np.ndarray], inception: Path, device: str) -> dict[str, Any]:
    """{"fid": {value, n}, "kid": {value, low, high, n}} of uint8 [h, w, 3] pictures; KID's interval is by subsampling.

    Means over m of n pictures, drawn without replacement, scatter around the mean over all sqrt(n / m - 1) times as
    much as that itself does: once for halves, not at all for subsets as large as the whole. n is the smaller side's.
    Raises UserError if torchmetrics or the network is missing, or there are fewer than four pictures on a side.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except ModuleNotFoundError:
        raise UserError("FID and KID need torchmetrics: pip install torchmetrics") from None
    network = _Features(inception).to(device)
    features = {True: _embed(real, network, device), False: _embed(drawn, network, device)}
    least = min(map(len, features.values()))
    if least < 4:
        raise UserError("FID and KID need four pictures on each side at least")
    size = min(KID_SUBSET_SIZE, least // 2)
    fid = FrechetInceptionDistance(feature=_Given())
    kid = KernelInceptionDistance(feature=_Given(), subsets=KID_SUBSETS, subset_size=size)
    for is_real, values in features.items():
        fid.update(values, real=is_real)
        kid.update(values, real=is_real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, std = (v.item() for v in kid.compute())
    reach = 1.96 * std / math.sqrt(least / size - 1)
    return {
        "fid": {"value": fid.compute().item(), "low": None, "high": None, "n": len(features[False])},
        "kid": {"value": mean, "low": mean - reach, "high": mean + reach, "n": len(features[False])},
    }


class _Given(nn.Module):
    """Passes features through: they were made once for both distances."""

    num_features = 2048

    def forward(self, features: Tensor) -> Tensor:
        return features


@torch.no_grad()
def _embed(pictures: Iterable[np.ndarray], network: nn.Module, device: str) -> Tensor:
    """[N, 2048], on the CPU; pictures of one size go together."""
    found, batch = [], []
    for picture in pictures:
        if batch and (len(batch) == BATCH or picture.shape != batch[0].shape):
            found.append(_run(batch, network, device))
            batch = []
        batch.append(picture)
    if batch:
        found.append(_run(batch, network, device))
    return torch.cat(found) if found else torch.empty(0, _Features.num_features)


def _run(batch: list[np.ndarray], network: nn.Module, device: str) -> Tensor:
    images = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).to(device)
    return network(images).float().cpu()
