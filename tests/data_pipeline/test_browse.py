import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.encoding import Encoder
from data_pipeline.sample import RawSample
from data_pipeline.shards import read_encoded, shard_name, write_raw
from model.conditioner import Conditioner
from vae.autoencoder import VAE


@pytest.fixture
def browse(run_entry, tmp_path: Path):
    def call(data: Path, *flags) -> tuple[list[np.ndarray], str]:
        done = run_entry("data_pipeline/browse.py", "--data", data, "--out", tmp_path / "page.html", *flags)
        assert done.returncode == 0, done.stderr
        html = (tmp_path / "page.html").read_text()
        found = re.findall(r"data:image/jpeg;base64,([^\"]+)", html)
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(x)))) for x in found], html

    return call


def solid(i: int) -> RawSample:
    file = io.BytesIO()
    Image.new("RGB", (40, 20), (10 * i, 0, 255 - 10 * i)).save(file, "PNG")
    meta = {"caption": f"number {i} <b>", "lines": [{"text": "x", "box": [5, 5, 20, 15]}], "scores": {"luma": 0.25}}
    return RawSample(f"k{i:02d}", file.getvalue(), "png", meta)


def test_raw_pictures_with_their_captions_in_order(tmp_path: Path, browse):
    samples = [solid(i) for i in range(20)]
    samples[3].image = b"rubbish"
    write_raw(tmp_path / shard_name(0), samples[:12])
    write_raw(tmp_path / shard_name(1), samples[12:])
    pictures, html = browse(tmp_path, "--count", "30")
    assert [round(p.mean((0, 1))[0] / 10) for p in pictures] == [i for i in range(20) if i != 3]
    captions = re.findall(r"number (\d+) &lt;b&gt;", html)
    assert [int(c) for c in captions] == [i for i in range(20) if i != 3]
    assert "is not a picture" in html and "luma 0.25" in html and "40 x 20" in html
    assert not re.search(r'(src|href)="(?!data:)', html)  # self-contained
    few, _ = browse(tmp_path, "--count", "5")
    assert len(few) == 5 and browse(tmp_path, "--count", "5", "--seed", "1")[1] != browse(tmp_path, "--count", "5")[1]
    (outlined, *_), _ = browse(tmp_path / shard_name(0), "--boxes")
    assert outlined[5, 5:20, 0].mean() > 180 and outlined[10, 12, 0] < 60


def test_latents_are_decoded_with_components(tmp_path: Path, browse, make_raw, components: Path):
    vae = VAE.from_folder(components)
    encoder = Encoder(Conditioner.from_folder(components), vae, res=64)
    write_raw(tmp_path / "raw.tar", make_raw(5))
    (tmp_path / "encoded").mkdir()
    encoder.encode_shard(tmp_path / "raw.tar", tmp_path / "encoded" / shard_name(0), pytest.fail, lambda n: None)
    pictures, html = browse(tmp_path / "encoded", "--components", components)
    sizes = re.findall(r"latent 16 x 1 x (\d+) x (\d+), (\d+) text tokens", html)
    assert [p.shape[:2] for p in pictures] == [(8 * int(h), 8 * int(w)) for h, w, _ in sizes] and len(pictures) == 5
    colours, _ = browse(tmp_path / "encoded")
    assert all(a.shape == b.shape and not np.array_equal(a, b) for a, b in zip(pictures, colours, strict=True))
    first = next(read_encoded(tmp_path / "encoded" / shard_name(0)))
    expected = (vae.decode_latent(first.latent[None])[0, :, 0].permute(1, 2, 0).numpy() + 1) * 127.5
    grey = pictures[0].mean(axis=2), expected.mean(axis=2)  # JPEG keeps brightness better than colour
    assert np.abs(grey[0] - grey[1]).mean() < 3 < np.abs(grey[0][::-1] - grey[1]).mean()


def test_nothing_to_show_is_said(tmp_path: Path, run_entry):
    for folder in (tmp_path, tmp_path / "none"):
        done = run_entry("data_pipeline/browse.py", "--data", folder)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and str(folder) in done.stderr
