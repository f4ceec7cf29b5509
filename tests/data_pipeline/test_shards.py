import json
import os
import random
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.sample import EncodedSample, RawSample
from data_pipeline.sample_index import shard_table
from data_pipeline.shards import list_shards, read_encoded, read_raw, shard_name, write_encoded, write_raw
from data_pipeline.tar_index import index_path, read_member, scan, tar_index


def raw(n: int, seed: int = 0) -> list[RawSample]:
    rng = np.random.default_rng(seed)
    return [
        RawSample(
            f"k{i:03d}", rng.bytes(int(rng.integers(1, 3000))), "png", {"caption": f"picture “{i}” 图", "z": i, "a": 1}
        )
        for i in range(n)
    ]


def encoded(n: int, references: int = 0) -> list[EncodedSample]:
    generator = torch.Generator().manual_seed(0)
    return [
        EncodedSample(
            f"k{i:03d}",
            torch.randn(16, 1, 4 + 2 * (i % 3), 6, generator=generator),
            torch.randn(3 + i, 8, generator=generator).bfloat16(),
            [torch.randn(16, 1, 2, 4, generator=generator) for _ in range(references)],
            torch.randn(2, 8, generator=generator).bfloat16() if references else None,
            {"caption": f"picture {i}"},
        )
        for i in range(n)
    ]


def test_the_same_samples_give_the_same_bytes_and_come_back(tmp_path: Path):
    samples = raw(20)
    assert write_raw(tmp_path / "a.tar", samples) == 20
    shuffled = [RawSample(s.key, s.image, s.ext, dict(reversed(s.meta.items()))) for s in samples]
    write_raw(tmp_path / "b.tar", iter(shuffled))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert list(read_raw(tmp_path / "a.tar")) == samples
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


def test_encoded_samples_come_back_exactly(tmp_path: Path):
    samples = encoded(4) + [EncodedSample("r" + s.key, *list(vars(s).values())[1:]) for s in encoded(2, references=2)]
    write_encoded(tmp_path / "a.tar", samples)
    for mine, theirs in zip(samples, read_encoded(tmp_path / "a.tar"), strict=True):
        assert mine.key == theirs.key and mine.meta == theirs.meta
        assert theirs.txt.dtype == torch.bfloat16 and theirs.latent.dtype == torch.float32
        pairs = [
            (mine.latent, theirs.latent),
            (mine.txt, theirs.txt),
            *zip(mine.references, theirs.references, strict=True),
        ]
        assert all(torch.equal(a, b) for a, b in pairs)
        assert (mine.txt_empty is None) == (theirs.txt_empty is None)


def test_the_index_that_the_writer_keeps_is_what_the_headers_say(tmp_path: Path):
    keys = ["a", "été", "x" * 150]  # the last two take headers of more than one block
    samples = [EncodedSample(key, torch.rand(16, 1, 2, 4), torch.rand(i + 1, 8).bfloat16(), meta={"caption": "c"})
               for i, key in enumerate(keys)]  # fmt: skip
    path = tmp_path / shard_name(0)
    assert write_encoded(path, samples) == 3
    kept = index_path(path).read_bytes()
    assert tar_index(path) == scan(path) and len(scan(path).entries) == 3
    assert index_path(path).read_bytes() == kept


def test_a_failing_producer_leaves_nothing_and_keeps_what_was_there(tmp_path: Path):
    write_raw(tmp_path / "a.tar", raw(2))
    before = (tmp_path / "a.tar").read_bytes()

    def samples():
        yield from raw(3, seed=1)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        write_raw(tmp_path / "a.tar", samples())
    assert (tmp_path / "a.tar").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_what_a_killed_writer_left_is_removed_and_never_listed(tmp_path: Path):
    target = tmp_path / shard_name(0)
    killed = """if True:
        import os, pathlib, sys
        from files import atomic_file
        with atomic_file(pathlib.Path(sys.argv[1])):
            os.kill(os.getpid(), 9)
    """
    assert subprocess.run([sys.executable, "-c", killed, target]).returncode == -9
    (left,) = tmp_path.iterdir()
    fresh, old = (tmp_path / f".tmp-1-0-elsewhere{i}-{target.name}" for i in range(2))
    for file in (fresh, old):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 25 * 60 * 60,) * 2)
    with pytest.raises(ValueError, match="holds no .tar shards"):
        list_shards(tmp_path)
    write_raw(target, raw(1))
    assert {p.name for p in tmp_path.iterdir()} == {target.name, fresh.name}, "another host may be writing it"


def test_two_writers_of_one_shard_do_not_disturb_each_other(tmp_path: Path):
    def slow():
        yield raw(2)[0]
        assert write_raw(tmp_path / "a.tar", raw(2)) == 2  # begins later, ends first
        assert [s.key for s in read_raw(tmp_path / "a.tar")] == [s.key for s in raw(2)]
        yield raw(2)[1]

    assert write_raw(tmp_path / "a.tar", slow()) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]
    assert [s.key for s in read_raw(tmp_path / "a.tar")] == [s.key for s in raw(2)]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (RawSample("a.b", b"x", "png", {"caption": ""}), "without '.' and '/'"),
        (RawSample("", b"x", "png", {"caption": ""}), "without '.' and '/'"),
        (RawSample("a", b"x", "gif", {"caption": ""}), "jpg or png"),
        (RawSample("a", b"x", "png", {"text": ""}), "a: its record has no caption"),
    ],
)
def test_bad_samples_are_refused(tmp_path: Path, sample: RawSample, message: str):
    with pytest.raises(ValueError, match=message):
        write_raw(tmp_path / "a.tar", [sample])
    with pytest.raises(ValueError, match="comes twice"):
        write_raw(tmp_path / "a.tar", raw(1) + raw(1))
    assert not list(tmp_path.iterdir())


def test_a_tar_cut_at_any_byte_gives_the_samples_before_the_cut(tmp_path: Path):
    samples = raw(12)
    whole = tmp_path / "whole.tar"
    write_raw(whole, samples)
    data = whole.read_bytes()
    ends = [max(at + size for at, size in e.members.values()) for e in tar_index(whole).entries]
    rng = random.Random(0)
    for cut in [0, 1, 511, 512, *ends[:3], *(e + 1 for e in ends[:3]), *(rng.randrange(len(data)) for _ in range(60))]:
        path = tmp_path / "cut.tar"
        path.write_bytes(data[:cut])
        problems = []
        found = list(read_raw(path, problems.append))
        assert found == samples[: len(found)], cut
        assert sum(-(-end // 512) * 512 <= cut for end in ends) <= len(found) <= sum(end <= cut for end in ends), cut
        if cut < -(-ends[-1] // 512) * 512:
            assert problems and all(p.shard == "cut.tar" for p in problems), cut
            with pytest.raises(ValueError, match="cut.tar"):
                list(read_raw(path))


def test_a_broken_header_in_the_middle_is_reported_not_taken_for_the_end(tmp_path: Path):
    path = tmp_path / "a.tar"
    write_raw(path, raw(6))
    at, size = tar_index(path).entries[2].members["png"]
    data = bytearray(path.read_bytes())
    header = at + -(-size // 512) * 512
    data[header : header + 512] = random.Random(0).randbytes(512)
    path.write_bytes(data)
    problems = []
    assert [s.key for s in read_raw(path, problems.append)] == ["k000", "k001", "k002"]
    assert "no valid header" in problems[0].what
    assert "no valid header" in tar_index(path).problem


def test_broken_records_are_reported_and_the_rest_is_read(tmp_path: Path):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        tar.write({"__key__": "good", "png": b"x", "json": b'{"caption": "c"}'})
        tar.write({"__key__": "list", "png": b"x", "json": b'["caption"]'})
        tar.write({"__key__": "half", "png": b"x", "json": b'{"capt'})
        tar.write({"__key__": "none", "png": b"x", "json": b"{}"})
        tar.write({"__key__": "lone", "png": b"x"})
        tar.write({"__key__": "text", "json": b'{"caption": "c"}'})
        tar.write({"__key__": "last", "jpg": b"x", "json": b'{"caption": "c"}'})
    problems = []
    assert [s.key for s in read_raw(tmp_path / "a.tar", problems.append)] == ["good", "last"]
    assert [p.key for p in problems] == ["list", "half", "none", "lone", "text"]


def test_what_no_shard_may_hold_costs_that_sample_alone(tmp_path: Path):
    import webdataset

    good = b'{"caption": "c"}'
    records = {
        "good": good,
        "a/b": good,
        "./c": good,
        "nan": b'{"caption": "c", "x": NaN}',
        "vast": b'{"caption": "c", "x": [1e999]}',
        "half": b'{"caption": "\\ud800"}',
        "deep": b'{"caption": "c", "x": ' + b"[" * 100_000,
        "more": good,
    }
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        for key, record in records.items():
            tar.write({"__key__": key, "png": b"x", "json": record})
        tar.write({"__key__": "good", "png": b"y", "json": good})
    problems = []
    found = list(read_raw(tmp_path / "a.tar", problems.append))
    assert [(s.key, s.image) for s in found] == [("good", b"x"), ("more", b"x")]
    assert [p.key for p in problems] == ["a/b", "./c", "nan", "vast", "half", "deep", "good"]
    assert "without '.' and '/'" in problems[0].what and "came before" in problems[-1].what
    assert {p.shard for p in problems} == {"a.tar"}
    assert write_raw(tmp_path / "b.tar", found) == 2


def test_random_access_reads_what_the_tar_holds(tmp_path: Path):
    samples = raw(9)
    path = tmp_path / "a.tar"
    write_raw(path, samples)
    index = tar_index(path)
    with open(path, "rb") as file:
        for sample, entry in reversed(list(zip(samples, index.entries, strict=True))):
            assert read_member(file.fileno(), entry, "png") == sample.image
            assert json.loads(read_member(file.fileno(), entry, "json")) == sample.meta


def test_the_cached_index_is_used_but_never_stale(tmp_path: Path):
    path = tmp_path / "a.tar"
    write_encoded(path, encoded(5))
    first = tar_index(path)
    cache = index_path(path)
    assert first.entries[1].shapes == {"latent": (16, 1, 6, 6), "txt": (4, 8)}
    inode = cache.stat().st_ino
    assert tar_index(path) == first and cache.stat().st_ino == inode
    write_encoded(path, encoded(5)[::-1])  # the same size, other contents
    assert [e.key for e in tar_index(path).entries] == [f"k{i:03d}" for i in reversed(range(5))]
    for rubbish in (b"", b"[]", b"{", cache.read_bytes()[:100], b'{"size": 1}'):
        cache.write_bytes(rubbish)
        assert len(tar_index(path).entries) == 5


def test_an_index_works_in_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.tar"
    write_encoded(path, encoded(2))

    def refuse(*_):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr("data_pipeline.tar_index.atomic_file", refuse)
    assert len(tar_index(path).entries) == 2


def test_a_broken_safetensors_header_costs_its_sample_alone(tmp_path: Path):
    path = tmp_path / "a.tar"
    write_encoded(path, encoded(3))
    at, _ = tar_index(path).entries[1].members["safetensors"]
    data = bytearray(path.read_bytes())
    data[at : at + 8] = b"\xff" * 8
    path.write_bytes(data)
    index = tar_index(path)
    assert [e.key for e in index.entries if "latent" in e.shapes] == ["k000", "k002"] and index.problem is None
    table = shard_table(path)
    assert len(table) == 2 and table.problems == (f"{path}/k001: not a whole sample",)
