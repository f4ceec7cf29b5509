import filecmp
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import planted
import pytest

from data_pipeline.pictures import decode
from data_pipeline.sample import RawSample
from data_pipeline.shards import list_shards, read_raw, shard_name, write_raw

SHARP = ("coins.png", "camera.png", "gravel.png", "grace_hopper.jpg", "motorcycle_left.png")


def sample(key: str, pixels: np.ndarray, source: str = "photo", caption: str = "a good photograph", quality: int = 92):
    height, width, _ = pixels.shape
    meta = {"caption": caption, "source": source, "width": width, "height": height}
    return RawSample(key, planted.jpeg(pixels, quality), "jpg", meta)


@pytest.fixture(scope="module")
def raw_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 shards of 12; key says what should become of each: kept, or the filter that should drop it."""
    folder = tmp_path_factory.mktemp("curate") / "raw"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pictures = planted.apart(10, seed=3, names=SHARP)
    plain = np.full((128, 128, 3), 200, np.uint8)
    samples = [sample(f"kept-{i}", p) for i, p in enumerate(pictures[:42])]
    samples[5] = replace(samples[5], image=samples[5].image[:3000], key="broken-0")
    samples[6] = sample("clarity-plain", plain)
    samples[7] = sample("kept-shape", plain, source="shapes")
    samples[8] = sample("invalid_caption-0", pictures[8], caption="IMG_0001.JPG")
    samples[9] = sample("clarity-0", planted.enlarged(pictures[9], rng))
    samples[10] = sample("resolution-0", pictures[10][:40])
    smaller, larger = planted.resized(pictures[44], 0.6, 0.6), pictures[44]
    samples += [sample("duplicate-0", smaller), sample("kept-large", larger), sample("duplicate-1", larger, quality=50)]
    blurred = planted.enlarged(planted.resized(pictures[47], 2, 2), rng)
    samples += [sample("clarity-large", blurred), sample("kept-sharp", pictures[47])]
    for s in range(4):
        write_raw(folder / shard_name(s), samples[12 * s : 12 * s + 12])
    return folder


@pytest.fixture
def curate(run_entry):
    def call(data: Path, out: Path, *flags: object) -> subprocess.CompletedProcess:
        exempt = ("--recipe", "report") if "--recipe" not in flags else ()
        return run_entry("data_pipeline/curate.py", "--data", data, "--out", out, *exempt, *flags)

    return call


@pytest.fixture
def small_sides(monkeypatch: pytest.MonkeyPatch):
    """The report's recipe, for pictures of 48 px and more."""
    from data_pipeline import stages

    toy = stages.TOY
    rules = [tuple(r if r.filter != "duplicate" else stages.REPORT[1].rules[-1] for r in s.rules) for s in toy]
    monkeypatch.setitem(stages.RECIPES, "report", tuple(replace(s, rules=r) for s, r in zip(toy, rules, strict=True)))


def outputs(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix in (".tar", ".json", ".html") and "index" not in p.name)


def same_files(a: Path, b: Path) -> bool:
    assert outputs(a) == outputs(b)
    _, differ, missing = filecmp.cmpfiles(a, b, outputs(a), shallow=False)
    return not differ and not missing


def test_each_sample_meets_its_fate(raw_folder: Path, tmp_path: Path, curate, small_sides):
    out = tmp_path / "out"
    done = curate(raw_folder, out, "--workers", 1)
    assert done.returncode == 0, done.stderr
    kept = [s for shard in list_shards(out) for s in read_raw(shard)]
    audit = json.loads((out / "audit.json").read_text())
    dropped = {key: f["filter"] for f in audit["filters"] for key, _ in f["dropped_examples"]}
    assert {s.key.split("-")[0] for s in kept} == {"kept"}
    assert dropped and all(key.startswith(name) for key, name in dropped.items()), dropped
    assert len(kept) + len(dropped) == 47 == audit["samples"] and audit["kept"] == len(kept)
    original = {s.key: s for shard in list_shards(raw_folder) for s in read_raw(shard)}
    for s in kept:
        added = {"scores": s.meta["scores"], "labels": {"caption_split": "raw"}}
        assert s.image == original[s.key].image and s.meta == original[s.key].meta | added
        assert ("clarity" in s.meta["scores"]) == (s.meta["source"] == "photo")
        assert s.meta["scores"]["broken"] == 0
    assert [f["filter"] for f in audit["filters"]][:2] == ["broken", "file_size"]
    sources = audit["sources"]
    assert sources["shapes"] == [1, 1] and sources["photo"] == [46, len(kept) - 1]
    assert "clip: not run: no weights" in done.stdout and "token_length: not run: no tokenizer" in done.stdout
    html = (out / "audit.html").read_text()
    assert html.count("not run: no weights") == 3 and html.count("not run: no tokenizer") == 1
    assert "repeats kept-large" in html and html.count("data:image/jpeg") > 40
    assert not re.search(r'(src|href)="(?!data:)', html)


def test_any_number_of_workers_gives_the_same_files(raw_folder: Path, tmp_path: Path, curate, small_sides):
    for workers in (1, 3):
        assert curate(raw_folder, tmp_path / str(workers), "--workers", workers).returncode == 0
    assert same_files(tmp_path / "1", tmp_path / "3")
    assert same_files(tmp_path / "1" / "scores", tmp_path / "3" / "scores")


def test_killed_anywhere_and_run_again_gives_the_same_files(
    raw_folder: Path, tmp_path: Path, curate, kill_entry, small_sides
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert curate(raw_folder, whole, "--workers", 1).returncode == 0
    for pattern in ("scores/*.npy", "scores/shard-000002*", "*.tar", "audit.json"):
        flags = ("--data", raw_folder, "--recipe", "report", "--workers", 1, "--out", killed)
        kill_entry("data_pipeline/curate.py", *flags, once=lambda pattern=pattern: any(killed.glob(pattern)))
    assert curate(raw_folder, killed, "--workers", 1).returncode == 0
    assert same_files(whole, killed)


def test_a_second_run_does_nothing_and_other_rules_do_it_again(raw_folder: Path, tmp_path: Path, curate, small_sides):
    out = tmp_path / "out"
    curate(raw_folder, out, "--workers", 1)
    times = {p.name: p.stat().st_mtime_ns for p in [*out.glob("shard*.tar"), *out.glob("scores/*")]}
    again = curate(raw_folder, out, "--workers", 1)
    assert again.returncode == 0 and "kept 39 of 47" in again.stdout
    assert times == {p.name: p.stat().st_mtime_ns for p in [*out.glob("shard*.tar"), *out.glob("scores/*")]}
    fewer = curate(raw_folder, out, "--workers", 1, "--stages", "1")
    assert fewer.returncode == 0 and "kept 45 of 47" in fewer.stdout
    assert len(json.loads((out / "audit.json").read_text())["filters"]) == 5


def test_a_cut_shard_is_passed_over_and_said(raw_folder: Path, tmp_path: Path, curate, small_sides):
    data = tmp_path / "data"
    data.mkdir()
    for shard in list_shards(raw_folder):
        (data / shard.name).write_bytes(shard.read_bytes())
    cut = data / shard_name(1)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (data / shard_name(2)).write_bytes(b"")
    done = curate(data, tmp_path / "out", "--workers", 2)
    assert done.returncode == 0 and f"skipped {shard_name(1)}: " in done.stdout
    assert f"skipped {shard_name(2)}: empty file" in done.stdout
    assert 20 < json.loads((tmp_path / "out" / "audit.json").read_text())["samples"] < 35
    assert not list(read_raw(tmp_path / "out" / shard_name(2)))


def test_bad_requests_end_in_one_line(raw_folder: Path, tmp_path: Path, curate):
    write_raw(tmp_path / shard_name(0), [sample("a", np.zeros((64, 64, 3), np.uint8))])
    cases = [
        ((tmp_path / "none", tmp_path / "out"), "is not a folder"),
        ((raw_folder, raw_folder), "is the input folder"),
        ((raw_folder, tmp_path / "out", "--stages", "1-x"), "--stages takes numbers"),
        ((raw_folder, tmp_path / "out", "--stages", "9"), "has no stage 9"),
        ((tmp_path, tmp_path / "out", "--workers", 1), "every sample was dropped"),
    ]
    for arguments, message in cases:
        done = curate(*arguments)
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr


def test_no_picture_is_decoded_twice(raw_folder: Path, tmp_path: Path, small_sides, monkeypatch: pytest.MonkeyPatch):
    from data_pipeline.curation import Curation
    from data_pipeline.filters import view
    from data_pipeline.filters.tools import Tools
    from data_pipeline.shard_stage import shards_as_inputs
    from data_pipeline.stages import RECIPES

    decoded = []
    monkeypatch.setattr(view, "decode", lambda data: decoded.append(data) or decode(data))
    inputs = shards_as_inputs(raw_folder, tmp_path / "out")
    curation = Curation(raw_folder, tmp_path / "out", RECIPES["report"][:3], inputs, Tools())
    curation.score(1, lambda: None)
    curation.write(curation.decide(), lambda: None)
    images = [s.image for shard in list_shards(raw_folder) for s in read_raw(shard)]
    broken = [s.image for shard in list_shards(raw_folder) for s in read_raw(shard) if s.key.startswith("broken")]
    assert sorted(decoded) == sorted(images) and len(broken) == 1
