"""Encoding and decoding as others use it: sizes, lengths, streams, bad input."""

import os
import subprocess
import sys

import pytest
import torch

from vae.autoencoder import PRESETS, VAE


@pytest.fixture(scope="module")
def vae() -> VAE:
    torch.manual_seed(0)
    return VAE(PRESETS["tiny"]).eval()


def clip(frames: int, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(2, 3, frames, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_sizes_that_are_no_multiple_of_8_come_back(vae):
    x = clip(1, 19, 30)
    latent = vae.encode_latent(x)
    assert latent.shape == (2, 16, 1, 3, 4)
    bordered = torch.cat([x, x[..., -1:].expand(-1, -1, -1, -1, 2)], dim=-1)
    bordered = torch.cat([bordered, bordered[..., -1:, :].expand(-1, -1, -1, 5, -1)], dim=-2)
    torch.testing.assert_close(latent, vae.encode_latent(bordered))
    whole = vae.decode_latent(latent)
    assert whole.shape == (2, 3, 1, 24, 32)
    assert torch.equal(vae.decode_latent(latent, size=(1, 19, 30)), whole[..., :19, :30])
    for size in ((1, 19, 33), (1, 16, 30), (2, 19, 30), (19, 30)):
        with pytest.raises(ValueError, match="cannot have been padded"):
            vae.decode_latent(latent, size=size)


@pytest.mark.parametrize("frames", [2, 4, 7])
def test_other_lengths_are_refused_or_padded_never_dropped(vae, frames):
    x = clip(frames)
    with pytest.raises(ValueError, match=f"{frames} frames are not 1"):
        vae.encode_latent(x)
    latent = vae.encode_latent(x, other_lengths="pad")
    full = 1 + -(-(frames - 1) // 4) * 4
    padded = torch.cat([x, x[:, :, -1:].expand(-1, -1, full - frames, -1, -1)], dim=2)
    torch.testing.assert_close(latent, vae.encode_latent(padded))
    assert vae.decode_latent(latent, size=(frames, 16, 24)).shape == x.shape


@pytest.mark.parametrize("pieces", [(13,), (1, 4, 4, 4), (2, 3, 7, 1), (1,) * 13])
def test_a_stream_equals_the_whole_clip(vae, pieces):
    x = clip(13)
    with torch.no_grad():
        mean, _ = vae.moments(x)
        latent = vae.normalise(mean)
        streamed = list(vae.encode_stream(x.split(pieces, dim=2)))
        assert [z.shape[2] for z in streamed] == [1, 1, 1, 1]
        torch.testing.assert_close(torch.cat(streamed, dim=2), latent, rtol=1e-5, atol=1e-5)
        y = vae.reconstruct(mean).clamp(-1, 1)
        frames = list(vae.decode_stream(latent.split((1, 2, 1), dim=2)))
        assert [f.shape[2] for f in frames] == [1, 4, 4, 4]
        torch.testing.assert_close(torch.cat(frames, dim=2), y, rtol=1e-5, atol=1e-5)


def test_the_first_frame_stands_alone(vae):
    x = clip(9)
    torch.testing.assert_close(vae.encode_latent(x)[:, :, :1], vae.encode_latent(x[:, :, :1]), rtol=1e-5, atol=1e-5)
    z = vae.encode_latent(x)
    torch.testing.assert_close(vae.decode_latent(z)[:, :, :1], vae.decode_latent(z[:, :, :1]), rtol=1e-5, atol=1e-5)


def test_a_stream_of_a_wrong_length_says_so(vae):
    with pytest.raises(ValueError, match="1 \\+ a multiple of 4 frames"):
        list(vae.encode_stream(clip(7).split(1, dim=2)))
    with pytest.raises(ValueError, match="one or more"):
        list(vae.encode_stream([]))


def test_each_decoder_serves_its_own(vae):
    both = VAE(PRESETS["tiny"])
    both.load_state_dict(vae.state_dict())
    both.split_decoders()
    both.decoder.conv_out.bias.data += 0.5
    z = torch.randn(1, 16, 2, 2, 2)
    image = both.decode_latent(z[:, :, :1])
    assert torch.equal(both.decode_latent(z), vae.decode_latent(z))
    assert torch.equal(both.decode_latent(z[:, :, :1], decoder="video"), vae.decode_latent(z[:, :, :1]))
    assert not torch.equal(image, vae.decode_latent(z[:, :, :1]))
    assert torch.equal(both.decode_latent(z[:, :, :1], decoder="image"), image)


def test_fingerprint_covers_encoder_and_statistics_alone(vae):
    other = VAE(PRESETS["tiny"])
    other.load_state_dict(vae.state_dict())
    other.decoder.conv_in.bias.data += 1
    assert other.fingerprint() == vae.fingerprint()
    other.quant_conv.bias.data += 1
    assert other.fingerprint() != vae.fingerprint()


BAD_PIXELS = {
    "channels": (torch.zeros(1, 4, 1, 16, 16), r"\[B, 3, T, H, W\].*\(1, 4, 1, 16, 16\)"),
    "a picture without T": (torch.zeros(1, 3, 16, 16), r"\(1, 3, 16, 16\)"),
    "an empty clip": (torch.zeros(1, 3, 0, 16, 16), "T >= 1"),
    "bytes": (torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8), "must be floats"),
    "NaN": (torch.full((1, 3, 1, 16, 16), float("nan")), "not NaN"),
    "0 to 255": (torch.full((1, 3, 1, 16, 16), 200.0), r"in \[-1, 1\].*\[200, 200\]"),
}


@pytest.mark.parametrize("name", BAD_PIXELS)
def test_bad_pixels_are_named(vae, name):
    pixels, message = BAD_PIXELS[name]
    with pytest.raises(ValueError, match=message):
        vae.encode_latent(pixels)


def test_bad_latents_are_named(vae):
    with pytest.raises(ValueError, match=r"\[B, 16, F, h, w\].*\(1, 4, 1, 2, 2\)"):
        vae.decode_latent(torch.zeros(1, 4, 1, 2, 2))
    with pytest.raises(ValueError, match="NaN"):
        vae.decode_latent(torch.full((1, 16, 1, 2, 2), float("nan")))


MEMORY = """
import sys, torch
from vae.autoencoder import PRESETS, VAE
torch.manual_seed(0)
vae = VAE(PRESETS["tiny"])
frames = lambda n: (torch.zeros(1, 3, 4 if i else 1, 64, 64) for i in range(n))
peak = lambda: int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) / 1024
for n in (3, 3 * int(sys.argv[1])):
    for _ in vae.decode_stream(vae.encode_stream(frames(n))): pass
    print(peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_long_clip_does_not_grow():
    # one arena and no large block kept after free: the peak is what is held, not how the allocator cut it up
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY, "10"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    short, long = map(float, out.split())
    assert long < short + 8, "MiB"  # 27 more latent frames would hold 1.3 GiB of activations
