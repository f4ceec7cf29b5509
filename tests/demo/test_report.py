"""The demo's page over pictures of the user's."""

import io
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline import shards
from data_pipeline.sample import RawSample
from data_pipeline.shards import write_raw
from demo import recipes, report
from demo.report import RawSamples
from model.sample import read_picture


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_only_samples_that_are_shown_are_read_and_broken_ones_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    raw = tmp_path / "data" / "raw"
    raw.mkdir(parents=True)
    for shard in range(2):
        pictures = [b"no picture" if (shard, i) == (1, 0) else png() for i in range(5)]
        samples = [RawSample(f"{shard}{i}", p, "png", {"caption": f"c{shard}{i}"}) for i, p in enumerate(pictures)]
        write_raw(raw / f"shard-{shard:06d}.tar", samples)
    samples = RawSamples(raw)
    assert sorted(samples.captions(20)) == [f"c{s}{i}" for s in range(2) for i in range(5)]
    pictures = samples.pictures(20)
    assert len(pictures) == 9 and all(picture.size == (24, 16) for picture in pictures)
    read, whole = set(), shards.raw_sample
    monkeypatch.setattr(shards, "raw_sample", lambda shard, entry: read.add(entry.key) or whole(shard, entry))
    assert samples.captions(3) == samples.captions(3) and len(read) == 3


def test_the_first_page_needs_nothing_but_pictures(tmp_path: Path):
    raw = tmp_path / "data" / "raw"
    raw.mkdir(parents=True)
    write_raw(raw / "shard-000000.tar", [RawSample(f"{i}", png(), "png", {"caption": "a"}) for i in range(3)])
    report.main(report.Config(line=tmp_path))
    assert (tmp_path / "report" / "index.html").is_file()


def test_changed_pictures_are_another_line(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png())
    line = lambda **more: recipes.stages(recipes.RECIPES["demo"], Path("out"), tmp_path, **more)[0]  # noqa: E731
    first = line()
    assert first == line() and "--skip-bad" not in first.command and "--skip-bad" in line(skip_bad=True).command
    (tmp_path / "a.txt").write_text("a red picture")
    second = line().reads
    assert line().command == first.command and second != first.reads
    (tmp_path / ".DS_Store").touch()
    assert line().reads == second
    tar = tmp_path / "a.tar"
    tar.touch()
    of_tar = lambda: recipes.stages(recipes.RECIPES["demo"], Path("out"), tar)[0].reads  # noqa: E731
    empty = of_tar()
    tar.write_bytes(b"more")
    assert of_tar() != empty


@pytest.mark.parametrize("gpus, processes", [(0, 2), (1, None), (2, 2), (8, 2)])
def test_trainers_are_not_more_than_gpus(gpus: int, processes: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recipes, "count_gpus", lambda: gpus)
    (stage,) = (s for s in recipes.stages(recipes.RECIPES["demo"], Path("out"), None) if s.name == "grpo")
    expected = ["posttrain/flow_grpo.py"] if processes is None else ["torchrun", "--nproc-per-node", str(processes)]
    assert stage.command[: len(expected)] == expected


def test_a_picture_to_edit_is_seen_as_training_sees_it(tmp_path: Path):
    sideways = Image.new("RGBA", (24, 16), (0, 0, 0, 0))
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "a.png", exif=exif)
    picture = read_picture(tmp_path / "a.png")
    assert picture.size == (16, 24) and picture.getpixel((0, 0)) == (255, 255, 255)
