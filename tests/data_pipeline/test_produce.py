import filecmp
import io
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from data_pipeline.dataset import EncodedDataset
from data_pipeline.encoding import Encoder
from data_pipeline.loader import Loader
from data_pipeline.pictures import decode, fit
from data_pipeline.sample import RawSample
from data_pipeline.shards import read_encoded, shard_name, write_raw
from model.conditioner import Conditioner
from vae.autoencoder import VAE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def encoder(components: Path) -> Encoder:
    return Encoder(Conditioner.from_folder(components), VAE.from_folder(components), res=64, batch_size=4)


@pytest.fixture
def raw_folder(tmp_path: Path, make_raw) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    for i in range(3):
        write_raw(folder / shard_name(i), make_raw(13, seed=i))
    return folder


@pytest.fixture
def produce(run_entry, components: Path):
    def call(raw: Path, out: Path, *flags: str, components: Path = components) -> subprocess.CompletedProcess:
        return run_entry("data_pipeline/produce.py", "--data", raw, "--components", components, "--out", out, *flags)

    return call


def test_each_sample_is_its_own_picture_and_caption(tmp_path: Path, make_raw, encoder: Encoder):
    samples = make_raw(17)
    write_raw(tmp_path / "raw.tar", samples)
    seen = []
    assert encoder.encode_shard(tmp_path / "raw.tar", tmp_path / "out.tar", pytest.fail, seen.append) == sum(seen) == 17
    found = {s.key: s for s in read_encoded(tmp_path / "out.tar")}
    assert set(found) == {s.key for s in samples}
    for raw in samples:
        pixels, _ = fit(decode(raw.image), 64)
        alone = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None, :, None] / 127.5 - 1
        latent = encoder.vae.encode_latent(alone)[0]
        torch.testing.assert_close(found[raw.key].latent, latent, atol=1e-5, rtol=1e-5)
        (txt,) = encoder.conditioner.encode([raw.meta["caption"]])
        torch.testing.assert_close(found[raw.key].txt.float(), txt, atol=1e-2, rtol=1e-2)
        assert found[raw.key].meta.items() >= raw.meta.items()
        height, width, _ = pixels.shape
        assert found[raw.key].meta["bucket"] == [width, height] and latent.shape == (16, 1, height // 8, width // 8)


def test_another_batch_size_changes_nothing_that_matters(tmp_path: Path, make_raw, encoder: Encoder):
    write_raw(tmp_path / "raw.tar", make_raw(11))
    for size in (1, 4):
        other = replace(encoder, batch_size=size)
        other.encode_shard(tmp_path / "raw.tar", tmp_path / f"{size}.tar", pytest.fail, lambda n: None)
    one, four = ({s.key: s for s in read_encoded(tmp_path / f"{size}.tar")} for size in (1, 4))
    for key, sample in one.items():
        torch.testing.assert_close(sample.latent, four[key].latent, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sample.txt, four[key].txt, atol=2e-2, rtol=2e-2)


def test_damaged_pictures_are_passed_over_and_named(tmp_path: Path, make_raw, encoder: Encoder):
    samples = make_raw(6)
    samples[2] = replace(samples[2], image=samples[2].image[: len(samples[2].image) // 2])
    samples[4] = replace(samples[4], image=b"no picture")
    write_raw(tmp_path / "raw.tar", samples)
    problems = []
    assert encoder.encode_shard(tmp_path / "raw.tar", tmp_path / "out.tar", problems.append, lambda n: None) == 4
    assert [(p.key, p.what.split()[0]) for p in problems] == [(samples[2].key, "cannot"), (samples[4].key, "is")]


def test_exif_transparency_and_depth_are_undone(photograph: np.ndarray, tmp_path: Path):
    upright = Image.fromarray(photograph[:300])
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(decode((tmp_path / "a.png").read_bytes())), photograph[:300])
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "b.png")
    assert decode((tmp_path / "b.png").read_bytes()).getcolors() == [(16, (255, 255, 255))]
    Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)).save(tmp_path / "c.png")
    grey = np.asarray(decode((tmp_path / "c.png").read_bytes()))
    assert grey.shape == (8, 8, 3) and grey.min() == 0 and grey.max() == 255


def test_what_cannot_be_encoded_costs_that_sample_alone(tmp_path: Path, make_raw, produce, monkeypatch):
    import webdataset

    from data_pipeline import pictures

    samples = make_raw(9)
    samples[2].meta["caption"] = "the text <|image_pad|> on a screen"
    samples[6].image = b"\x89PNG" + bytes(30)
    record = {s.key: json.dumps(s.meta).encode() for s in samples}
    record[samples[4].key] = b'{"caption": "c", "score": NaN}'
    (tmp_path / "raw").mkdir()
    with webdataset.TarWriter(str(tmp_path / "raw" / shard_name(0)), encoder=False) as tar:
        for i, s in enumerate(samples):
            tar.write({"__key__": f"sub/{s.key}" if i == 5 else s.key, "png": s.image, "json": record[s.key]})
    done = produce(tmp_path / "raw", tmp_path / "out")
    assert done.returncode == 0 and "5 samples in 1 shards" in done.stdout, done.stderr
    for i, what in ((2, "must not contain"), (4, "its record is no JSON"), (6, "")):
        assert f"skipped shard-000000.tar/{samples[i].key}: " in done.stdout and what in done.stdout
    assert f"skipped shard-000000.tar/sub/{samples[5].key}: the key" in done.stdout

    def let_out(image, in_place):
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", let_out)
    with pytest.raises(ValueError, match="cannot be decoded: unpack"):
        pictures.decode(samples[0].image)


def test_captions_that_are_cut_are_counted(tmp_path: Path, make_raw, produce):
    samples = make_raw(3)
    samples[1].meta["caption"] = "words without an end " * 600
    (tmp_path / "raw").mkdir()
    write_raw(tmp_path / "raw" / shard_name(0), samples)
    result = produce(tmp_path / "raw", tmp_path / "out", "--res", "64")
    assert result.returncode == 0 and "have 1024 tokens or more" in result.stdout, result.stderr
    assert max(len(s.txt) for s in read_encoded(tmp_path / "out" / shard_name(0))) == 1024


def test_a_latent_that_is_not_finite_costs_that_sample_alone(tmp_path: Path, make_raw, encoder: Encoder, monkeypatch):
    samples = make_raw(3)
    write_raw(tmp_path / "raw.tar", samples)
    encode, seen, problems = VAE.encode_latent, [], []

    def broken_once(self, pixels):
        seen.append(pixels)
        return encode(self, pixels) * (float("nan") if len(seen) == 2 else 1)

    monkeypatch.setattr(VAE, "encode_latent", broken_once)
    alone = replace(encoder, batch_size=1)
    assert alone.encode_shard(tmp_path / "raw.tar", tmp_path / "out.tar", problems.append, lambda n: None) == 2
    assert [(p.shard, p.key, p.what) for p in problems] == [
        ("raw.tar", samples[1].key, "its latent holds NaN or infinity")
    ]


DISPLAY_P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))
"""XYZ (D50) of red, green and blue."""


def icc_profile(primaries: tuple) -> bytes:
    """LittleCMS's sRGB profile with other primaries."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack(">I", profile[128:132])
    entries = (profile[at : at + 8] for at in range(132, 132 + 12 * count, 12))
    tags = {bytes(entry[:4]): struct.unpack(">I", entry[4:])[0] for entry in entries}
    for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True):
        profile[tags[name] + 8 : tags[name] + 20] = struct.pack(">3i", *(round(v * 65536) for v in xyz))
    return bytes(profile)


def test_colours_are_brought_to_srgb_by_the_profile(photograph: np.ndarray):
    from_linear = lambda x: np.where(x <= 0.0031308, 12.92 * x, 1.055 * x.clip(0.0031308) ** (1 / 2.4) - 0.055)  # noqa: E731
    to_linear = lambda x: np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)  # noqa: E731
    xyz = to_linear(photograph / 255) @ np.array(DISPLAY_P3)
    wanted = 255 * from_linear((xyz @ np.linalg.inv(np.array(SRGB))).clip(0, 1))

    def decoded(image: Image.Image, form: str = "PNG", **options) -> np.ndarray:
        file = io.BytesIO()
        image.save(file, form, **options)
        return np.asarray(decode(file.getvalue())).astype(float)

    image, p3 = Image.fromarray(photograph), icc_profile(DISPLAY_P3)
    assert np.abs(photograph - wanted).max() > 20
    assert np.abs(decoded(image, icc_profile=p3) - wanted).max() < 3
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True, icc_profile=p3)
    assert np.abs(decoded(decode(file.getvalue())) - wanted).max() < 3, "not twice"
    opaque = image.copy()
    opaque.putalpha(255)
    assert np.abs(decoded(opaque, icc_profile=p3) - wanted).max() < 3
    assert np.array_equal(decoded(image, icc_profile=icc_profile(SRGB)), photograph), "sRGB must stay as it is"
    for unusable in (b"rubbish", p3[:200], p3[:16] + b"GRAY" + p3[20:]):
        assert np.array_equal(decoded(image, icc_profile=unusable), photograph)
    grey = image.convert("L")
    assert np.array_equal(decoded(grey, icc_profile=p3)[..., 0], np.asarray(grey)), "three colours say nothing of one"


def test_deep_pictures_are_not_stretched():
    def decoded(values: np.ndarray, form: str = "PNG") -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(values).save(file, form)
        return np.asarray(decode(file.getvalue()))[..., 0]

    dark = np.linspace(0, 20_000, 64).reshape(8, 8)
    for form in ("PNG", "TIFF"):
        assert np.abs(decoded(dark.astype(np.uint16), form) - dark / 257).max() <= 1
    assert np.abs(decoded((dark / 65535).astype(np.float32), "TIFF") - dark / 257).max() <= 1
    for beyond in (dark, np.full((4, 4), np.nan)):
        with pytest.raises(ValueError, match="floating-point"):
            decoded(beyond.astype(np.float32), "TIFF")


def test_the_command_makes_a_data_set_that_trains_and_is_not_redone(raw_folder: Path, produce, tmp_path: Path):
    out = tmp_path / "out"
    done = produce(raw_folder, out)
    assert done.returncode == 0 and "39 samples in 3 shards" in done.stdout, done.stderr
    dataset = EncodedDataset(out)
    assert len(dataset) == 39 and dataset.fingerprint.resolution == 64
    (batch,) = next(Loader(dataset, 39))
    assert len({s.key for s in batch}) == 39
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("shard*")}
    assert "39 samples" in produce(raw_folder, out).stdout
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("shard*") if "index" not in p.name}.items() <= before.items()
    refused = produce(raw_folder, out, "--res", "96")
    assert refused.returncode == 2 and "resolution: 64 there, 96 here" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_killed_and_run_again_gives_the_same_bytes(raw_folder: Path, components: Path, tmp_path: Path, kill_entry):
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def produce_until(once: Callable[[], bool], out: Path) -> None:
        # Always a process of its own: bits depend on the number of threads, which other tests may have changed here.
        flags = ("--data", raw_folder, "--components", components, "--out", out)
        kill_entry("data_pipeline/produce.py", *flags, once=once)

    produce_until(lambda: False, whole)
    for pattern in (".tmp-*.tar", "shard-000001.tar"):
        produce_until(lambda pattern=pattern: any(killed.glob(pattern)), killed)
    (killed / f".tmp-1-0-gone-{shard_name(2)}").write_bytes(b"half a shard")
    (killed / ".tmp-1-0-gone-shard-000001.index.json").write_bytes(b"half an index")
    for leftover in killed.glob(".tmp-1-0-gone-*"):
        os.utime(leftover, (0, 0))
    produce_until(lambda: False, killed)
    assert not list(killed.glob(".tmp*"))
    names = [p.name for p in whole.glob("*.tar")] + ["dataset.json", "empty.safetensors"]
    assert len(names) == 5
    _, differ, missing = filecmp.cmpfiles(whole, killed, names, shallow=False)
    assert not differ and not missing


def test_producers_that_begin_at_different_times_make_each_shard_once(
    raw_folder: Path, components: Path, tmp_path: Path
):
    command = [sys.executable, "data_pipeline/produce.py", "--data", raw_folder, "--components", components]

    def run(out: Path, producers: int) -> None:
        started = []
        for _ in range(producers):
            started.append(subprocess.Popen([*command, "--out", out], stdout=subprocess.PIPE, text=True, cwd=ROOT))
            time.sleep(0.5)
        for process in started:
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0 and "39 samples in 3 shards" in said

    run(tmp_path / "one", 1)
    run(tmp_path / "three", 3)
    assert len(EncodedDataset(tmp_path / "three")) == 39
    for i in range(3):
        assert filecmp.cmp(tmp_path / "one" / shard_name(i), tmp_path / "three" / shard_name(i), shallow=False)
    assert not list((tmp_path / "three" / "claims").iterdir())


def test_filters_drop_samples_before_they_are_encoded(raw_folder: Path, produce, tmp_path: Path):
    rule = ["--stages", "1", "--filters", "resolution=100"]
    done = produce(raw_folder, tmp_path / "out", *rule)
    assert done.returncode == 0, done.stderr
    dataset = EncodedDataset(tmp_path / "out")
    kept = [dataset[i] for i in range(len(dataset))]
    assert 0 < len(kept) < 39 and f"{39 - len(kept)} dropped by filters" in done.stdout
    assert all(s.meta["scores"]["resolution"] >= 100 for s in kept)
    assert dataset.scores("resolution").min() >= 100
    again = produce(raw_folder, tmp_path / "out", *rule)
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    curated = produce(raw_folder, tmp_path / "all")
    assert curated.returncode == 0 and len(EncodedDataset(tmp_path / "all")) == 39


def test_changed_input_is_encoded_anew_and_foreign_shards_are_refused(
    raw_folder: Path, produce, tmp_path: Path, make_raw
):
    out = tmp_path / "out"
    assert produce(raw_folder, out).returncode == 0
    changed = make_raw(5, seed=9)
    write_raw(raw_folder / shard_name(1), changed)
    assert produce(raw_folder, out).returncode == 0
    assert {s.key for s in read_encoded(out / shard_name(1))} == {s.key for s in changed}
    (raw_folder / shard_name(2)).unlink()
    refused = produce(raw_folder, out)
    assert refused.returncode == 2 and "holds shards of other data (shard-000002.tar" in refused.stderr


def test_bad_requests_end_in_one_line(tmp_path: Path, produce, components: Path):
    for name in ("empty", "bad"):
        (tmp_path / name).mkdir()
    broken = RawSample("a", b"rubbish", "png", {"caption": "c"})
    write_raw(tmp_path / "bad" / shard_name(0), [broken])
    cases = [
        ((tmp_path / "none", components), "does not exist"),
        ((tmp_path / "empty", components), "holds no .tar shards"),
        ((tmp_path / "bad", components), "no sample of"),
        ((tmp_path / "bad", tmp_path / "empty"), "has no tokenizer/"),
        ((tmp_path / "bad", components, "--res", "100"), "multiple of 16, not 100"),
    ]
    for (raw, parts, *flags), message in cases:
        result = produce(raw, tmp_path / "out", *flags, components=parts)
        assert result.returncode == 2 and message in result.stderr, (message, result.stderr)
        assert "Traceback" not in result.stderr
    assert not json.loads((tmp_path / "out" / "shard-000000.record.json").read_text())["samples"]


def test_a_network_that_the_card_has_no_room_for(tmp_path: Path):
    from data_pipeline.production import ROOM, has_room

    for part in range(2):
        (tmp_path / f"model-{part}.safetensors").write_bytes(b"0" * 1000)
    (tmp_path / "config.json").write_bytes(b"0" * 10**5)
    assert has_room(tmp_path, int(2000 * ROOM) + 1) and not has_room(tmp_path, int(2000 * ROOM) - 1)
