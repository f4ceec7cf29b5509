"""Tiles against diffusers' tiled encoding and decoding, their seams, their memory, and where they are refused."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from evaluation.vae_suite import reconstruct
from vae.autoencoder import PRESETS, VAE, Tiles


def smooth_vae() -> VAE:
    """Random weights whose reconstructions stay inside [-1, 1]: diffusers does not clamp tiled ones."""
    torch.manual_seed(0)
    vae = VAE(PRESETS["tiny"]).eval()
    vae.decoder.conv_out.weight.data *= 0.2
    return vae


def clip(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(height)) * 2 - 1


@pytest.mark.parametrize(
    "frames,height,width,side,stride",
    [(1, 80, 104, 32, 24), (1, 32, 72, 32, 16), (1, 72, 40, 40, 40), (5, 48, 56, 32, 24)],
)
def test_tiles_equal_diffusers(frames, height, width, side, stride):
    vae = smooth_vae()
    vae.tiles = Tiles(side, stride)
    theirs = AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1, latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    theirs.load_state_dict(vae.state_dict())
    theirs.enable_tiling(side, side, stride, stride)
    x = clip(frames, height, width)
    with torch.no_grad():
        latent = theirs.encode(x).latent_dist.mode()
        torch.testing.assert_close(vae.encode_latent(x), latent, rtol=1e-5, atol=1e-5)
        y = theirs.decode(latent).sample
        assert 0.01 < y.std() and y.abs().max() < 1
        torch.testing.assert_close(vae.decode_latent(latent), y, rtol=1e-5, atol=1e-5)


def test_other_sizes_come_back_and_what_fits_is_whole():
    vae, tiled = smooth_vae(), smooth_vae()
    tiled.tiles = Tiles(32, 24)
    x = clip(1, 51, 75)
    latent = tiled.encode_latent(x)
    assert latent.shape == (1, 16, 1, 7, 10)
    assert tiled.decode_latent(latent, size=(1, 51, 75)).shape == x.shape
    small = clip(1, 32, 29)
    assert torch.equal(tiled.encode_latent(small), vae.encode_latent(small))


def test_seams_are_blended():
    numbers = iter(range(9))
    ramps = Tiles(64, 32).apply(lambda tile: torch.full_like(tile, next(numbers)), torch.zeros(96, 96), 8, 8)
    assert ramps[0, 0] == 0 and 7 < ramps[-1, -1] <= 8 and next(numbers, None) is None
    assert max(ramps.diff(dim=d).abs().max() for d in (0, 1)) < 0.3  # unblended tiles differ by 1 and 3


def test_bad_tiles_are_named():
    for side, stride in ((60, 32), (64, 30), (64, 72), (64, 0)):
        with pytest.raises(ValueError, match="multiples of 8"):
            Tiles(side, stride)


def test_tiled_pictures_are_not_scored():
    vae = smooth_vae()
    vae.tiles = Tiles()
    with pytest.raises(ValueError, match="not scored in tiles"):
        reconstruct(vae, np.zeros((32, 32, 3), np.uint8))


MEMORY = """
import sys, torch
from vae.autoencoder import PRESETS, VAE, Tiles
peak = lambda: int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) / 1024
vae = VAE(PRESETS["tiny"])
vae.tiles = Tiles(128, 96) if sys.argv[1] == "tiled" else None
x = torch.zeros(1, 3, 1, 1024, 1024)
before = peak()
vae.decode_latent(vae.encode_latent(x))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tiles_bound_memory():
    whole, tiled = (
        float(subprocess.run([sys.executable, "-c", MEMORY, k], capture_output=True, text=True, check=True).stdout)
        for k in ("whole", "tiled")
    )
    assert tiled < 0.6 * whole, "MiB"
