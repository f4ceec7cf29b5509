import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.annotation import Annotator, Splits
from data_pipeline.pictures import decode
from data_pipeline.shards import list_shards, read_raw


@pytest.fixture
def ingest(run_entry):
    return lambda data, out, *flags: run_entry("data_pipeline/ingest.py", "--data", data, "--out", out, *flags)


@pytest.fixture
def folder(tmp_path: Path, photograph: np.ndarray) -> Path:
    """20 pictures in several formats and folders, captions in both forms."""
    root = tmp_path / "my photos"
    for i in range(20):
        ext = ("jpg", "png", "webp", "JPEG", "bmp")[i % 5]
        path = root / ("a" if i % 2 else "a/b.c") / f"pic {i}.{ext}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph[i : i + 60, 2 * i : 2 * i + 90]).save(path)
        if i % 3:
            path.with_suffix(".txt").write_text(f"caption {i}: 图\n", encoding="utf-8")
        else:
            path.with_suffix(".json").write_text(json.dumps({"caption": f"caption {i}: 图", "mood": "calm"}))
    return root


def samples(out: Path) -> list:
    return [s for shard in list_shards(out) for s in read_raw(shard)]


def test_a_folder_becomes_shards(folder: Path, ingest, tmp_path: Path):
    result = ingest(folder, tmp_path / "out", "--shard-size", "8")
    assert result.returncode == 0 and "20 pictures in 3 shards" in result.stdout, result.stderr
    found = samples(tmp_path / "out")
    assert len({s.key for s in found}) == 20
    for sample in found:
        source = folder / sample.meta["file"]
        number = int(source.stem.split()[1])
        assert sample.meta["caption"] == f"caption {number}: 图" and sample.meta["source"] == "user"
        assert (sample.meta["width"], sample.meta["height"]) == (90, 60)
        assert sample.meta.get("mood") == (None if number % 3 else "calm")
        if source.suffix in (".jpg", ".JPEG", ".png"):
            assert sample.image == source.read_bytes()
        assert np.array_equal(np.asarray(decode(sample.image)), np.asarray(Image.open(source).convert("RGB")))


def test_names_of_other_systems(ingest, tmp_path: Path, photograph: np.ndarray):
    """Suffixes in capitals, names whose bytes are no UTF-8, a blank text beside a record with the caption."""
    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    picture = io.BytesIO()
    Image.fromarray(photograph[:60, :90]).save(picture, "JPEG")
    for name in ("IMG_1.JPG", os.fsdecode(b"caf\xe9.jpg"), "c.jfif"):
        (folder / name).write_bytes(picture.getvalue())
    (folder / "IMG_1.TXT").write_text("one")
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("two")
    (folder / "c.txt").write_text(" \n")
    (folder / "c.json").write_text('{"caption": "three"}')
    result = ingest(folder, out)
    assert result.returncode == 0, result.stderr
    found = {s.meta["caption"]: s.meta["file"] for s in samples(out)}
    assert found == {"one": "IMG_1.JPG", "two": "caf\\xe9.jpg", "three": "c.jfif"}


def test_captioned_pictures_of_unread_kinds_are_named(ingest, tmp_path: Path, photograph: np.ndarray):
    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    Image.fromarray(photograph[:60, :90]).save(folder / "a.png")
    for name in ("a.txt", "a.heic", "b.heic", "b.txt", "a.reference.0.heic", "README.txt", "README.md", "c.mov"):
        (folder / name).write_text("a text")
    result = ingest(folder, out)
    assert result.returncode == 2 and "2 of 3 pictures: a.reference.0.heic is of a kind that is not" in result.stderr
    result = ingest(folder, out, "--skip-bad")
    assert result.returncode == 0 and "left out 2 files" in result.stdout and len(samples(out)) == 1


def test_shards_that_are_written_again_alike_are_the_same(folder: Path, ingest, tmp_path: Path):
    """As of a folder that was copied without its times: what was made of them is not made again."""
    out = tmp_path / "out"
    times = []
    for _ in range(2):
        assert ingest(folder, out).returncode == 0
        times.append([shard.stat().st_mtime_ns for shard in list_shards(out)])
        for file in folder.rglob("*.*"):
            os.utime(file, ns=(1, 1))
    assert times[0] == times[1]


def test_a_second_run_writes_nothing_and_a_changed_caption_its_shard(folder: Path, ingest, tmp_path: Path):
    out = tmp_path / "out"
    for _ in range(2):
        assert ingest(folder, out, "--shard-size", "8").returncode == 0
        times = {p.name: p.stat().st_mtime_ns for p in list_shards(out)}
    keys = {s.key: s.meta["caption"] for s in samples(out)}
    changed = next(folder.rglob("*.txt"))
    changed.write_text("another caption")
    assert ingest(folder, out, "--shard-size", "8").returncode == 0
    after = {p.name: p.stat().st_mtime_ns for p in list_shards(out)}
    assert sum(after[name] != times[name] for name in times) == 1
    assert sum(s.meta["caption"] != keys[s.key] for s in samples(out)) == 1


@pytest.mark.parametrize("skip", [False, True])
def test_bad_pictures_are_all_named_and_only_left_out_on_request(folder: Path, ingest, tmp_path: Path, skip: bool):
    pictures = sorted(p for p in folder.rglob("*") if p.suffix in (".jpg", ".png"))
    pictures[0].write_bytes(pictures[0].read_bytes()[:-200])
    pictures[1].write_bytes(b"")
    next(p for p in (pictures[2].with_suffix(".txt"), pictures[2].with_suffix(".json")) if p.exists()).unlink()
    for path in (pictures[3].with_suffix(".txt"), pictures[3].with_suffix(".json")):
        path.unlink(missing_ok=True)
    pictures[3].with_suffix(".json").write_text('{"caption": ')
    result = ingest(folder, tmp_path / "out", *["--skip-bad"] * skip)
    lines = result.stderr.splitlines()[-1] + result.stdout
    for path, what in zip(
        pictures, ["truncated", "not a picture", "has no caption", "its .json is broken"], strict=False
    ):
        assert str(path.relative_to(folder)) in lines and what in lines
    if skip:
        assert result.returncode == 0 and len(samples(tmp_path / "out")) == 16
    else:
        assert result.returncode == 2 and "4 of 20 pictures" in lines and "--skip-bad" in lines
        assert not (tmp_path / "out").exists()


ANNOTATION = {
    "caption": "An astronaut before a flag.",
    "caption_short": "An astronaut.",
    "type": "photograph",
    "style": "official",
    "domain": "people",
    "category": "people/astronaut",
    "watermarks": [],
    "abnormal_elements": [],
}
THEIRS = {
    "labels": ["cat"],
    "captions": ["a cat", "a sofa"],
    "category": ["animal", "cat"],
    "domain": {"name": "flickr.example"},
    "annotation": "by hand",
    "caption_split": "train",
    "scores": {"likes": "many"},
    "lines": [{"text": "SALE"}],
    "source": "flickr",
    "width": "wide",
    "bucket": "s3://pictures",
    "crop": None,
    "user": "ana",
}


def test_fields_of_a_user_survive_every_stage_and_break_none(ingest, run_entry, tmp_path: Path, photograph: np.ndarray):
    folder, raw, out = (tmp_path / name for name in ("photos", "raw", "out"))
    folder.mkdir()
    for i, fields in enumerate([*({name: value} for name, value in THEIRS.items()), THEIRS, {"labels": {"by": "ana"}}]):
        Image.fromarray(photograph[2 * i : 2 * i + 90, :80]).save(folder / f"{i}.png")
        (folder / f"{i}.json").write_text(
            json.dumps({"caption": "a portrait of an astronaut", "mood": "calm"} | fields)
        )
    assert ingest(folder, raw).returncode == 0
    flags = ("--stages", "3,6,7", "--workers", 1)
    curated = run_entry("data_pipeline/curate.py", "--data", raw, "--out", out, *flags)
    assert curated.returncode == 0, curated.stderr
    for where in (raw, out):
        found = {s.meta["file"]: s.meta for s in samples(where)}
        assert len(found) == len(THEIRS) + 2
        for i, (name, value) in enumerate(THEIRS.items()):
            assert found[f"{i}.png"]["user"] == {name: value} and found[f"{i}.png"]["mood"] == "calm"
        assert found[f"{len(THEIRS)}.png"]["user"] == THEIRS
        assert all(meta["source"] == "user" and meta["width"] == 80 for meta in found.values())
    labels = found[f"{len(THEIRS) + 1}.png"]["labels"]
    assert labels["by"] == "ana" and labels["caption_split"] == "raw"
    annotator = Annotator(lambda question, pictures: json.dumps(ANNOTATION), Splits())
    annotated = {s.meta["file"]: annotator.annotate(s).meta for s in samples(out)}
    for i, (name, value) in enumerate(THEIRS.items()):
        meta = annotated[f"{i}.png"]
        assert meta["user"] == {name: value} and meta["captions"]["raw"] == "a portrait of an astronaut"
    browsed = run_entry("data_pipeline/browse.py", "--data", out, "--out", tmp_path / "page.html")
    assert browsed.returncode == 0, browsed.stderr


def test_tars_of_other_tools(ingest, tmp_path: Path, photograph: np.ndarray):
    tars = tmp_path / "tars"
    tars.mkdir()

    def picture(i: int, form: str) -> bytes:
        file = io.BytesIO()
        Image.fromarray(photograph[i : i + 50, :50]).save(file, form)
        return file.getvalue()

    with webdataset.TarWriter(str(tars / "00000.tar"), encoder=False) as tar:
        for i in range(5):
            texts = {"txt": f"caption {i}".encode()} | ({"json": b'{"url": "u"}'} if i % 2 else {})
            tar.write({"__key__": f"{i:05d}", "jpg": picture(i, "JPEG"), **texts})
        tar.write({"__key__": "00005", "jpg": picture(5, "JPEG"), "json": b'{"caption": null}'})
        tar.write({"__key__": "00006", "cls": b"3"})
    with tarfile.open(tars / "b.tar", "w") as tar:  # as `tar cf b.tar ./` writes it
        for i in range(5, 12):
            for ext, data in (("webp", picture(i, "WEBP")), ("json", b'{"caption": "c"}')):
                info = tarfile.TarInfo(f"./x/{i}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    whole = (tars / "b.tar").read_bytes()
    result = ingest(tars, tmp_path / "out")
    assert result.returncode == 0 and "12 pictures in 2 shards" in result.stdout, result.stderr
    assert "00000.tar/00005: has no caption" in result.stdout and "00000.tar/00006: has no picture" in result.stdout
    found = samples(tmp_path / "out")
    assert len({s.key for s in found}) == 12 and {s.ext for s in found} == {"jpg", "png"}
    assert [s.meta.get("url") for s in found][:5] == [None, "u", None, "u", None]

    (tars / "b.tar").write_bytes(whole[: len(whole) // 2])
    cut = ingest(tars, tmp_path / "cut")
    assert cut.returncode == 0 and "skipped b.tar: " in cut.stdout
    assert 5 < len(samples(tmp_path / "cut")) < 12


def test_edits_in_tars_keep_what_they_began_with(ingest, tmp_path: Path, photograph: np.ndarray):
    def picture(i: int, form: str = "PNG") -> bytes:
        file = io.BytesIO()
        Image.fromarray(photograph[i : i + 50, :60]).save(file, form)
        return file.getvalue()

    mask = io.BytesIO()
    Image.new("L", (60, 50), 255).save(mask, "PNG")
    groups = {
        "ours": {"png": picture(0), "reference.0.png": picture(1), "mask.png": mask.getvalue()},
        "two": {"jpg": picture(2, "JPEG"), "reference.1.webp": picture(4, "WEBP"), "reference.0.png": picture(3)},
        "triple": {"input.jpg": picture(5, "JPEG"), "output.png": picture(6)},
        "target": {"source_0.png": picture(7), "target.jpg": picture(8, "JPEG")},
        "plain": {"jpg": picture(9, "JPEG")},
        "unknown": {"jpg": picture(9, "JPEG"), "src.jpg": picture(9, "JPEG")},
        "gap": {"jpg": picture(9, "JPEG"), "reference.1.png": picture(9)},
        "torn": {"jpg": picture(9, "JPEG"), "reference.0.png": picture(9)[:200]},
        "several": {"output.jpg": picture(9, "JPEG"), "after.jpg": picture(9, "JPEG"), "input.jpg": picture(9, "JPEG")},
    }
    with webdataset.TarWriter(str(tmp_path / "edits.tar"), encoder=False) as tar:
        for key, members in groups.items():
            tar.write({"__key__": key, "txt": b"make it night", **members})
    result = ingest(tmp_path / "edits.tar", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    for key, what in (
        ("unknown", "has a picture src.jpg of unknown use"),
        ("gap", "has references reference.1.png; number them"),
        ("torn", "its reference 0 "),
        ("several", "has several results"),
    ):
        assert f"edits.tar/{key}: {what}" in result.stdout
    found = {s.meta["file"].removeprefix("edits/"): s for s in samples(tmp_path / "out")}
    assert found.keys() == {"ours", "two", "triple", "target", "plain"}
    assert found["ours"].references == [picture(1)] and found["ours"].mask == mask.getvalue()
    shown = lambda data: np.asarray(decode(data)).tolist()  # noqa: E731
    for key, began in {"two": [picture(3), picture(4, "WEBP")], "triple": [picture(5, "JPEG")], "plain": []}.items():
        assert list(map(shown, found[key].references)) == list(map(shown, began))
        assert all(r.startswith(b"\x89PNG") for r in found[key].references)
    assert found["triple"].image == picture(6) and found["target"].image == picture(8, "JPEG")
    assert found["target"].references == [picture(7)]


def test_edits_in_folders_keep_what_they_began_with(ingest, tmp_path: Path, photograph: np.ndarray):
    folder = tmp_path / "edits"
    folder.mkdir()
    for i, name in enumerate(("a.PNG", "a.reference.0.png", "a.mask.png", "b.jpg", "b.c.png", "d.mask.jpg")):
        Image.fromarray(photograph[i : i + 50, :60]).save(folder / name)
        if "reference" not in name and name != "a.mask.png":
            (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    for _ in range(2):
        assert ingest(folder, tmp_path / "out").returncode == 0
        found = {s.meta["file"]: s for s in samples(tmp_path / "out")}
        assert found.keys() == {"a.PNG", "b.jpg", "b.c.png", "d.mask.jpg"}
        assert found["a.PNG"].references == [(folder / "a.reference.0.png").read_bytes()]
        assert found["a.PNG"].mask == (folder / "a.mask.png").read_bytes()
        assert not any(s.references for name, s in found.items() if name != "a.PNG")
        Image.fromarray(photograph[100:150, :70]).save(folder / "a.reference.0.png")


def test_bad_requests_end_in_one_line(ingest, folder: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.md").write_text("x")
    (tmp_path / "broken.tar").write_bytes(b"not a tar" * 1000)
    cases = [
        ("none", "does not exist"),
        ("empty", "holds no pictures"),
        ("note.md", "neither a folder nor a .tar"),
        ("broken.tar", "no picture of"),
    ]
    for name, message in cases:
        result = ingest(tmp_path / name, tmp_path / "out")
        last = result.stderr.splitlines()[-1]
        assert (
            result.returncode == 2 and message in last and last.startswith("error: ") and str(tmp_path / name) in last
        )
    assert "is inside" in ingest(folder, folder / "out").stderr
    assert not (folder / "out").exists()
