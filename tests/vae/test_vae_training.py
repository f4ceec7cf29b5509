"""vae/train.py as a user runs it: both recipes, kill -9 and go on, bad input; and what the objective rests on."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from PIL import Image

from data_pipeline.sample import RawSample
from data_pipeline.shards import shard_name, write_raw
from training.randomness import Randomness
from vae.autoencoder import PRESETS, VAE
from vae.cost import crop_flops
from vae.crops import Crops, Source, draw_crop
from vae.losses import balanced, kl
from vae.train import trainable

ROOT = Path(__file__).parents[2]
SMALL = ["--size", "32", "--crop", "16", "--batch-size", "4", "--statistics-samples", "4", "--warmup-steps", "1"]


def png(seed: int) -> bytes:
    from io import BytesIO

    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (5, 4, 3), dtype=np.uint8)).resize((40, 48))
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_raw(folder / shard_name(0), [RawSample(f"k{i}", png(i), "png", {"caption": ""}) for i in range(6)])
    return folder


def command(out: Path, *flags: object) -> list[str]:
    return [sys.executable, str(ROOT / "vae/train.py"), "--preset", "tiny", "--out", str(out), *map(str, flags), *SMALL]


def train(out: Path, *flags: object) -> str:
    done = subprocess.run(
        command(out, *flags), capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory, data) -> Path:
    out = tmp_path_factory.mktemp("base")
    train(out, "--data", data, "--steps", 6, "--clip-share", 0.3)
    return out


def test_base_writes_a_vae_whose_latents_are_unit_sized(base):
    vae = VAE.from_folder(base)
    assert vae.config.latents_std != PRESETS["tiny"].latents_std
    assert vae.video_decoder is None
    AutoencoderKLWan.from_pretrained(base / "vae")
    rows = [json.loads(r) for r in (base / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6] and rows[-1]["samples"] == 4.0
    one, five = (sum(crop_flops(partial(trainable("base"), PRESETS["tiny"], None), 16, n)) for n in (1, 5))
    assert all(4 * one <= row["flops"] <= 4 * five for row in rows) and len({row["flops"] for row in rows}) > 1


def test_a_killed_run_goes_on_bit_for_bit(base, data, tmp_path):
    flags = ("--data", data, "--steps", 6, "--clip-share", 0.3, "--save-every", 2)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command(tmp_path, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as run:
        while not (tmp_path / "checkpoints" / "step_00000002").exists() and run.poll() is None:
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
    assert not (tmp_path / "vae").exists()
    train(tmp_path, *flags)
    resumed, whole = VAE.from_folder(tmp_path), VAE.from_folder(base)
    assert resumed.config == whole.config
    assert all(torch.equal(w, whole.state_dict()[n]) for n, w in resumed.state_dict().items())
    assert (tmp_path / "metrics.jsonl").read_text() == (base / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def image_decoder(tmp_path_factory, base, data) -> Path:
    out = tmp_path_factory.mktemp("image-decoder")
    train(out, "--recipe", "image-decoder", "--init", base, "--data", data, "--steps", 3)
    return out


@pytest.fixture(scope="module")
def control(tmp_path_factory, base, data) -> Path:
    out = tmp_path_factory.mktemp("control")
    train(out, "--recipe", "video-decoder", "--init", base, "--data", data, "--steps", 3)
    return out


def test_image_decoder_leaves_encoder_and_video_decoder_bit_for_bit(base, image_decoder):
    before, after = VAE.from_folder(base), VAE.from_folder(image_decoder)
    assert after.config == before.config and after.fingerprint() == before.fingerprint()
    image = AutoencoderKLQwenImage.from_pretrained(image_decoder / "vae").state_dict()
    video = AutoencoderKLWan.from_pretrained(image_decoder / "vae_video").state_dict()
    changed = set()
    for name, weight in before.state_dict().items():
        assert torch.equal(video[name], weight), name
        if not torch.equal(image[name], weight):
            changed.add(name.split(".")[0])
    assert changed == {"decoder", "post_quant_conv"}


def test_video_decoder_trains_the_one_decoder_on(base, control, image_decoder, data, tmp_path):
    before, after = VAE.from_folder(base), VAE.from_folder(control)
    assert after.video_decoder is None and after.config == before.config
    theirs = after.state_dict()
    changed = {n for n, w in before.state_dict().items() if not torch.equal(w, theirs[n])}
    assert {n.split(".")[0] for n in changed} == {"decoder", "post_quant_conv"}
    assert any("time_conv" in n for n in changed)  # clips took part
    argv = command(tmp_path, "--recipe", "video-decoder", "--init", image_decoder, "--data", data)
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2 and f"start from {image_decoder}/vae_video" in done.stderr


def compare(*flags: object) -> subprocess.CompletedProcess:
    argv = [sys.executable, str(ROOT / "vae/compare_decoders.py"), "--read", "0", *map(str, flags)]
    return subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_decoders_are_compared_in_pairs_on_the_same_latents(base, control, image_decoder, data, tmp_path):
    kinds = [{"source": "photo", "photo": p} for p in ("a", "a", "b", "b")] + [{"source": "text"}] * 3
    samples = [RawSample(f"s{i}", png(i), "png", {"caption": "", **meta}) for i, meta in enumerate(kinds)]
    (tmp_path / "raw").mkdir()
    write_raw(tmp_path / "raw" / shard_name(0), samples)
    two = ("--control", control, "--candidate", image_decoder)
    done = compare(*two, "--base", base, "--raw", tmp_path / "raw", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "bit for bit: True" in done.stdout
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    before, after, change = found["domains"]["photo"]["psnr"]
    assert (change["n"], change["prompts"]) == (4, 2) and found["domains"]["text"]["psnr"][2]["prompts"] == 3
    assert change["value"] == pytest.approx(after["value"] - before["value"])
    assert Image.open(tmp_path / "out" / "comparison.png").width == 3 * 98 * 3

    same = compare("--control", base, "--candidate", base, "--base", base, "--raw", tmp_path / "raw", "--out", tmp_path)
    assert "bit for bit: False" in same.stdout and "+0.000 [+0.000, +0.000]" in same.stdout
    VAE(PRESETS["tiny"]).initialize(5).save(tmp_path / "stranger")
    done = compare("--control", tmp_path / "stranger", "--candidate", base, "--raw", tmp_path / "raw")
    assert done.returncode == 2 and "different encoders" in done.stderr


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--recipe", "image-decoder"], "needs --init"),
        (["--recipe", "video-decoder"], "needs --init"),
        (["--data", "/nowhere"], "/nowhere does not exist"),
        (["--crop", "20"], "multiple of 8"),
        (["--frames", "6"], "4k + 1"),
        (["--perceptual", "vibes"], "no perceptual distance 'vibes'"),
    ],
)
def test_bad_input_is_one_line(data, tmp_path, flags, message):
    flags = flags if "--data" in flags else ["--data", data, *flags]
    argv = [
        sys.executable,
        str(ROOT / "vae/train.py"),
        "--preset",
        "tiny",
        "--out",
        str(tmp_path / "out"),
        *map(str, flags),
    ]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "out" / "vae").exists()


def test_a_plan_says_what_is_trained_and_writes_nothing(data, tmp_path):
    argv = [sys.executable, str(ROOT / "vae/train.py"), "--preset", "qwen-image", "--data", str(data)]
    argv += ["--out", str(tmp_path / "out"), "--dry-run"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.stdout.startswith("encoder and decoder of a VAE (qwen-image, at random) on "), done.stderr
    assert "trained   126,892,531 of 126,892,531 parameters" in done.stdout and "+ 0.95 optimizer" in done.stdout
    assert not (tmp_path / "out").exists()


def test_flops_are_those_of_convolutions_and_attention():
    """A VAE of one convolution against a count by hand; a frozen encoder costs less."""

    class Convolution(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(5, 3, 3, 3))

        def forward(self, crops: Crops):
            y = torch.nn.functional.conv2d(crops.pixels[0][:, :, 0], self.weight, padding=1)
            return [(y, y, y)]

    products = 2 * 16 * 16 * 5 * 3 * 9
    assert crop_flops(Convolution, 16, 1) == (products, products)  # pixels need no gradient
    base, decoder = (
        crop_flops(partial(trainable(name), PRESETS["tiny"], None), 32, 1) for name in ("base", "image-decoder")
    )
    assert base[0] == decoder[0] and 1.9 < base[1] / base[0] < 2 and 1 < decoder[1] / decoder[0] < 1.5


def source(length: int, epoch: int = 0) -> Source:
    picture = torch.randint(0, 256, (1, 3, 96, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Source("key", picture, length, epoch)


def test_crops_are_a_function_of_seed_epoch_and_key():
    draw = lambda seed, epoch: draw_crop(source(1, epoch), Randomness(seed), 16, 32)  # noqa: E731
    assert torch.equal(draw(0, 0), draw(0, 0))
    assert not torch.equal(draw(0, 0), draw(0, 1)) and not torch.equal(draw(0, 0), draw(1, 0))
    assert draw(0, 0).shape == (3, 1, 16, 16) and draw(0, 0).abs().max() <= 1


def test_clips_move_smoothly():
    flat = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 4), (96, 64), mode="bicubic").clamp(0, 1)
    smooth = Source("key", (flat * 255).byte(), 9)
    clip = draw_crop(smooth, Randomness(3), 16, 32)
    assert clip.shape == (3, 9, 16, 16)
    steps = clip.diff(dim=1).abs().mean((0, 2, 3))
    assert steps.min() > 0 and (clip[:, -1] - clip[:, 0]).abs().mean() > steps.max()


def test_the_smaller_of_source_and_size_is_enlarged():
    tiny = Source("key", torch.full((1, 3, 8, 8), 255, dtype=torch.uint8), 1)
    torch.testing.assert_close(draw_crop(tiny, Randomness(0), 16, 32), torch.ones(3, 1, 16, 16))


def test_balanced_keeps_the_stated_ratio_of_gradients():
    x = torch.tensor([0.5, 2.0], requires_grad=True)
    main, other = x**2, 7 * x**3
    (gradient,) = torch.autograd.grad(balanced(main, other, 0.25).sum(), x)
    # main * (d log main + ratio * d log other) = x^2 * (2 / x + 0.25 * 3 / x)
    torch.testing.assert_close(gradient, 2.75 * x.detach())


def test_kl_equals_torch_distributions():
    mean, logvar = torch.randn(2, 16, 1, 2, 2), torch.randn(2, 16, 1, 2, 2)
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(kl(mean, logvar), theirs.flatten(1).mean(1))
