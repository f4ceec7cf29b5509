"""The reconstruction suite: measures against scikit-image, rows by domain, clusters, the page."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from data_pipeline.sample import RawSample
from evaluation.vae_suite import psnr, reconstruct, reconstruction_rows, summary, worst_window
from vae.autoencoder import PRESETS, VAE


def sample(key: str, size: tuple[int, int] = (53, 70), **meta) -> RawSample:
    pixels = np.random.default_rng(len(key)).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return RawSample(key, file.getvalue(), "png", {"caption": "", **meta})


class Reads:
    def read(self, image, protocol, language):
        return "one three"


@pytest.fixture(scope="module")
def vae() -> VAE:
    return VAE(PRESETS["tiny"]).initialize(0)


def test_rows_summary_and_page(vae, tmp_path):
    line = {"box": [0, 0, 1, 1], "text": "one two"}
    samples = [
        sample("a", source="photo", photo="cat.png"),
        sample("bb", source="photo", photo="cat.png"),
        sample("ccc", source="text", language="english", lines=[line]),
        sample("dddd", source="shapes"),
    ]
    page = tmp_path / "page.html"
    rows = reconstruction_rows(vae, samples, Reads(), page)
    assert [r["domain"] for r in rows] == ["photo", "photo", "english", "shapes"]
    assert rows[2]["text_original"] == rows[2]["text_reconstruction"] == 0.5
    table = summary(rows)
    assert table["photo"]["psnr"].n == 2 and table["photo"]["psnr"].prompts == 1
    assert page.read_text().count("<img") == 16
    with pytest.raises(ValueError, match="no pictures"):
        reconstruction_rows(vae, [])


def test_measures(vae):
    image = np.random.default_rng(0).integers(0, 256, (53, 70, 3), dtype=np.uint8)
    y = reconstruct(vae, image)
    assert y.shape == image.shape and y.dtype == np.float32 and 0 <= y.min() and y.max() <= 1
    x = image / 255
    assert psnr(x, y) == pytest.approx(peak_signal_noise_ratio(x, y.astype(np.float64), data_range=1))
    assert psnr(x, x) == 100
    other = image.copy()
    other[0:8, 60:70] ^= 255
    top, left = worst_window(image, other)
    assert top == 0 and left + 48 > 60
    assert torch.is_grad_enabled()
