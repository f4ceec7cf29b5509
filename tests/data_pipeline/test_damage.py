"""Whatever is wrong with a sample costs that sample, named with its shard: raw, as producers meet it, and encoded."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from data_pipeline.dataset import EncodedDataset
from data_pipeline.encoding import Encoder
from data_pipeline.loader import Loader
from data_pipeline.sample import EncodedSample
from data_pipeline.shards import read_encoded, shard_name, write_encoded
from data_pipeline.tar_index import scan
from model.conditioner import Conditioner
from vae.autoencoder import VAE

PICTURE, RECORD = "png", "json"


def png(size: int = 40) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), 90, np.uint8)).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def add(tar: tarfile.TarFile, name: str, data: bytes, **about) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in about.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def record(**fields) -> bytes:
    return json.dumps({"caption": "a red circle"} | fields).encode()


RAW = {
    "../../escape": {PICTURE: png(), RECORD: record()},
    "/etc/absolute": {PICTURE: png(), RECORD: record()},
    "bomb": {PICTURE: bomb(), RECORD: record()},
    "torn": {PICTURE: png()[:60], RECORD: record()},
    "nan": {PICTURE: png(), RECORD: b'{"caption": "c", "score": NaN}'},
    "deep": {PICTURE: png(), RECORD: b'{"caption": ' + b"[" * 100_000},
    "pickled": {"pkl": b"cos\nsystem\n(S'true'\ntR.", RECORD: record()},
    "silent": {PICTURE: png(), RECORD: b"{}"},
}
"""Raw samples that nobody can train on."""


def test_a_raw_sample_that_is_no_good_costs_itself(tmp_path: Path, components: Path):
    source, target = tmp_path / "raw.tar", tmp_path / shard_name(0)
    with tarfile.open(source, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, (key, members) in enumerate(RAW.items()):
            for ext, data in members.items():
                add(tar, f"{key}.{ext}", data)
            for ext, data in ((PICTURE, png()), (RECORD, record())):
                add(tar, f"good{number}.{ext}", data)
        add(tar, "linked.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "linked.json", record())
        for ext, data in ((PICTURE, png()), (RECORD, record())):
            add(tar, f"good0.{ext}", data)  # again
        add(tar, "stranger.txt", b"what is this?")
        for ext, data in ((PICTURE, png()), ("pkl", b"cos\nsystem\n."), (RECORD, record())):
            add(tar, f"last.{ext}", data)
    problems = []
    encoder = Encoder(Conditioner.from_folder(components), VAE.from_folder(components), res=32, batch_size=4)
    encoder.encode_shard(source, target, problems.append, lambda n: None)
    found = {sample.key for sample in read_encoded(target)}
    assert found == {"last", *(f"good{n}" for n in range(len(RAW)))}, "what a sample has beside its own is never read"
    assert {p.key for p in problems} == {*RAW, "linked", "good0", "stranger"} and {p.shard for p in problems} == {
        "raw.tar"
    }
    assert not (tmp_path.parent / "escape.png").exists()


def test_a_sparse_member_is_not_expanded(tmp_path: Path):
    """A member of GNU's sparse form may claim any size; its block says 1 TB here."""
    sparse = tarfile.TarInfo("vast.png")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
    block = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0%011o\0" % (0, 512)
    block[483:495] = b"%011o\0" % (8**11 - 1)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    good = io.BytesIO()
    with tarfile.open(fileobj=good, mode="w") as tar:
        add(tar, "good.png", png())
        add(tar, "good.json", record())
    (tmp_path / "a.tar").write_bytes(bytes(block) + bytes(512) + good.getvalue())
    index = scan(tmp_path / "a.tar")
    assert [entry.key for entry in index.entries] == ["good"] and index.problem is None


def encoded(latent: torch.Tensor | None = None, txt: torch.Tensor | None = None) -> bytes:
    good = {"latent": torch.ones(16, 1, 4, 4), "txt": torch.ones(3, 128).bfloat16()}
    return save({k: v.contiguous() for k, v in {**good, "latent": latent, "txt": txt}.items() if v is not None} or good)


LATENT, TXT = torch.ones(16, 1, 4, 4), torch.ones(3, 128).bfloat16()


def whole_set(tmp_path: Path) -> Path:
    """The folder of an encoded data set without shards."""
    folder = tmp_path / "data"
    folder.mkdir()
    fingerprint = {"vae": "v", "text_encoder": "t", "template": "p", "resolution": 32}
    (folder / "dataset.json").write_text(json.dumps({"fingerprint": fingerprint}))
    (folder / "empty.safetensors").write_bytes(save({"txt": TXT[:1].clone()}))
    return folder


def test_an_encoded_sample_that_is_no_good_costs_itself_and_training_goes_on(tmp_path: Path, capsys):
    latent, txt = LATENT, TXT
    late = {  # found as they are read
        "nan": encoded(latent * float("nan"), txt),
        "half": encoded(latent.half(), txt),
        "wide": encoded(latent, txt.float()),
    }
    early = {  # found by their headers
        "odd": encoded(latent[..., :3], txt),
        "flat": encoded(latent[:, 0], txt),
        "giant": struct.pack("<Q", 1 << 60) + b"{}",
        "larger": struct.pack("<Q", 200 << 20) + b"{",
        "cheat": struct.pack("<Q", 66)
        + b'{"latent":{"dtype":"F32","shape":[16,1,9999,9999],"data_offsets":[0,4]}}'[:66]
        + b"0000",
        "deep": struct.pack("<Q", 100_000) + b"[" * 100_000,
        "empty": b"",
    }
    folder = whole_set(tmp_path)
    with tarfile.open(folder / shard_name(0), "w", format=tarfile.GNU_FORMAT) as tar:
        for number, (key, data) in enumerate((late | early).items()):
            for name, block in ((key, data), (f"good{number}", encoded(latent, txt))):
                add(tar, f"{name}.json", record())
                add(tar, f"{name}.safetensors", block)
        for name in ("good0", "../up"):  # a key that came before, and one that leads elsewhere
            add(tar, f"{name}.json", record())
            add(tar, f"{name}.safetensors", encoded(latent * 2, txt))
        add(tar, "pickled.pkl", b"cos\nsystem\n.")
    dataset = EncodedDataset(folder)
    good = {f"good{n}" for n in range(len(late | early))}
    assert {dataset.key(i) for i in range(len(dataset))} == good | set(late)
    for key in (*early, "good0", "../up", "pickled"):
        assert any(f"{shard_name(0)}/{key}: " in problem for problem in dataset.problems), key
    loader = Loader(dataset, len(dataset), max_tokens=10**6)
    (batch,) = next(loader)
    loader.close()
    assert {s.key for s in batch} == good and all((s.latent == 1).all() for s in batch if s.key == "good0")
    said = capsys.readouterr().err
    assert all(f"passed over: {folder / shard_name(0)}/{key}: " in said for key in late)


@pytest.mark.parametrize("form", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_not_unpacked(form, tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", f"w:{form}") as tar:
        add(tar, "vast.png", bytes(10**6))
    index = scan(tmp_path / "a.tar")
    assert not index.entries and index.problem


def test_a_size_that_leads_back_ends_the_scan(tmp_path: Path):
    """Python's tarfile reads such a header for ever."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        add(tar, "good.png", png())
    good = file.getvalue()[: -(-len(png()) // 512) * 512 + 512]
    header = bytearray(tarfile.TarInfo("again.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(good + bytes(header) + bytes(1024))
    index = scan(tmp_path / "a.tar")
    assert [entry.key for entry in index.entries] == ["good"] and index.problem


@pytest.mark.parametrize("key", ["фото-1", "k" * 90, "图" * 80])
def test_keys_of_any_letters_and_length_are_trained_on(key, tmp_path: Path):
    folder = whole_set(tmp_path)
    samples = [EncodedSample(k, LATENT * i, TXT, meta={"caption": ""}) for i, k in enumerate((key, "other", key + "2"))]
    write_encoded(folder / shard_name(0), samples)
    dataset = EncodedDataset(folder)
    assert not dataset.problems and [dataset.key(i) for i in range(3)] == [key, "other", key + "2"]
    assert [(dataset[i].key, dataset[i].latent.max().item()) for i in range(3)] == [
        (key, 0),
        ("other", 1),
        (key + "2", 2),
    ]
