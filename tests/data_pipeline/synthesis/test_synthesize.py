import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.pictures import decode
from data_pipeline.shards import list_shards, read_raw
from data_pipeline.synthesis.fonts import find_faces
from data_pipeline.synthesis.kinds import KINDS, Recipe, parse_kinds

pytestmark = pytest.mark.machine

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = "data_pipeline/synthesize.py"
ALL = "text,scene,layout,shapes,photo,edit,square-shapes,neat-shapes"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 samples of all kinds at 192 px by one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    flags = ("--kinds", ALL, "--count", 48, "--size", 192, "--shard-size", 12, "--workers", 1, "--out", out)
    subprocess.run([sys.executable, SCRIPT, *map(str, flags)], cwd=ROOT, check=True, capture_output=True)
    return out


def test_samples_are_whole_and_say_what_they_show(alone: Path) -> None:
    samples = [sample for shard in list_shards(alone) for sample in read_raw(shard)]
    assert len(samples) == 48 and len({s.key for s in samples}) == 48
    counts = Counter(s.meta["source"] for s in samples)
    assert set(counts) == set(KINDS) and max(counts.values()) - min(counts.values()) <= 2
    ratios = set()
    for sample in samples:
        image = decode(sample.image)
        assert image.size == (sample.meta["width"], sample.meta["height"])
        ratios.add(round(image.width / image.height, 1))
        source = sample.meta["source"]
        assert bool(sample.references) == (sample.mask is not None) == (source == "edit")
        if "shapes" in source:
            meant = sample.meta["geneval"]["include"]
            assert all(clause["class"] in sample.meta["caption"] for clause in meant)
        if source in ("square-shapes", "neat-shapes"):
            assert image.size == (192, 192)
        if source in ("text", "scene"):
            squeeze = lambda text: text.replace(" ", "").replace("\n", "")  # noqa: E731
            shown = squeeze("".join(line["text"] for line in sample.meta["lines"]))
            assert shown in squeeze(sample.meta["caption"])
    assert len(ratios) >= 6


def test_workers_and_a_kill_change_nothing(alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, SCRIPT, "--kinds", ALL, "--count", "48", "--size", "192", "--shard-size", "12"]
    command += ["--workers", "2", "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, process_group=0)
    while process.poll() is None and not list(out.glob("*.tar")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(out.glob("*.tar"))
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert digests(out) == digests(alone)


def test_every_character_appears_as_often_as_asked(tmp_path: Path, run_entry) -> None:
    (tmp_path / "corpus.txt").write_text("Zebras jump.\nQuick fox\nA € and a \U00012000\n", encoding="utf-8")
    flags = ("--kinds", "text", "--count", 40, "--size", 64, "--corpus", tmp_path / "corpus.txt", "--workers", 1)
    result = run_entry(SCRIPT, *flags, "--min-occurrences", 4, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    (shard,) = list_shards(tmp_path / "out")
    counts = Counter("".join(line["text"] for sample in read_raw(shard) for line in sample.meta["lines"]))
    assert any(face.covers("€") for face in find_faces())
    assert all(counts[c] >= 4 for c in set("Zebrasjump.Quickfox€Aand"))
    assert counts["\U00012000"] == 0


def test_shares_hold_for_every_run_of_samples() -> None:
    recipe = Recipe(parse_kinds("text:3,shapes,photo:0.5"), 64, 0)
    for start in (0, 1000, 123_456):
        counts = Counter(recipe.kind(i) for i in range(start, start + 90))
        assert abs(counts["text"] - 60) <= 3 and abs(counts["shapes"] - 20) <= 3 and abs(counts["photo"] - 10) <= 3


def test_another_seed_makes_other_pictures_under_other_keys() -> None:
    one, two = (Recipe(parse_kinds("text"), 64, seed).make(0) for seed in (0, 1))
    assert one.key != two.key and one.image != two.image


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--kinds", "text,cats"),
            "unknown kind 'cats'; known are text, shapes, photo, scene, layout, edit, square-shapes, neat-shapes",
        ),
        (("--kinds", "text:none"), "the share of text must be a number, not 'none'"),
        (("--size", 100), "--size must be a multiple of 16"),
        (("--count", 0), "must be at least 1"),
        (("--corpus", "nowhere.txt"), "nowhere.txt does not exist"),
        (("--kinds", "layout", "--size", 64), "layouts have no room for type at 64 px"),
        (("--min-occurrences", 5, "--count", 9), "text samples"),
    ],
)
def test_bad_input_gets_one_line(flags, message: str, tmp_path: Path, run_entry) -> None:
    result = run_entry(SCRIPT, "--out", tmp_path / "out", "--workers", 1, "--count", 3, "--size", 64, *flags)
    assert result.returncode == 2 and message in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_folder_of_other_settings_is_refused(alone: Path, run_entry) -> None:
    before = digests(alone)
    result = run_entry(SCRIPT, "--out", alone, "--count", 48, "--size", 192, "--seed", 1, "--workers", 1)
    assert result.returncode == 2 and "was begun with" in result.stderr and "--seed 0" in result.stderr
    assert digests(alone) == before
    assert json.loads((alone / "synthesis.json").read_text())["seed"] == 0


def test_other_fonts_are_noticed(tmp_path: Path, run_entry) -> None:
    flags = ("--out", tmp_path, "--kinds", "text", "--count", 4, "--size", 64, "--shard-size", 2, "--workers", 1)
    assert run_entry(SCRIPT, *flags).returncode == 0
    noted = json.loads((tmp_path / "synthesis.json").read_text())
    files = {face.name: face.path.read_bytes() for face in find_faces()}
    assert noted["fonts"] == {n: hashlib.blake2b(data, digest_size=8).hexdigest() for n, data in files.items()}
    (tmp_path / "shard-000001.tar").unlink()
    other = noted["fonts"] | {"Comic Sans Bold": "00", "DejaVu Sans Bold": "11"}
    del other["DejaVu Serif Bold"]
    (tmp_path / "synthesis.json").write_text(json.dumps(noted | {"fonts": other}))
    refused = run_entry(SCRIPT, *flags)
    said = "begun with other fonts (gone: Comic Sans Bold; new: DejaVu Serif Bold; changed: DejaVu Sans Bold)"
    assert refused.returncode == 2 and said in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "shard-000001.tar").exists()
    (tmp_path / "synthesis.json").write_text(json.dumps(noted))
    assert run_entry(SCRIPT, *flags).returncode == 0
    shapes = run_entry(SCRIPT, "--out", tmp_path / "shapes", "--kinds", "shapes", "--count", 1, "--workers", 1)
    assert shapes.returncode == 0 and json.loads((tmp_path / "shapes" / "synthesis.json").read_text())["fonts"] == {}


def test_other_photographs_are_refused_after_a_lost_shard(tmp_path: Path, run_entry) -> None:
    flags = ("--kinds", "photo", "--count", 4, "--size", 64, "--shard-size", 2, "--workers", 1, "--out", tmp_path)
    assert run_entry(SCRIPT, *flags, "--photos", "chelsea.png", "coffee.png").returncode == 0
    lost = tmp_path / "shard-000001.tar"
    before = lost.read_bytes()
    lost.unlink()
    for others in ((), ("--photos", "chelsea.png")):
        refused = run_entry(SCRIPT, *flags, *others)
        assert refused.returncode == 2 and "begun with --photos chelsea.png coffee.png" in refused.stderr
        assert not lost.exists()
    assert run_entry(SCRIPT, *flags, "--photos", "coffee.png", "chelsea.png").returncode == 0
    assert lost.read_bytes() == before
    noted = json.loads((tmp_path / "synthesis.json").read_text())
    assert set(noted["photographs"]) == {"chelsea.png", "coffee.png"} and not noted["fonts"] and not noted["texts"]
    (tmp_path / "synthesis.json").write_text(
        json.dumps(noted | {"photographs": noted["photographs"] | {"coffee.png": "00"}})
    )
    refused = run_entry(SCRIPT, *flags, "--photos", "chelsea.png", "coffee.png")
    assert refused.returncode == 2 and "other photographs (changed: coffee.png)" in refused.stderr


def test_corpus_and_templates_are_told_by_their_contents(tmp_path: Path, run_entry) -> None:
    from data_pipeline.synthesis import templates

    (tmp_path / "corpus.txt").write_text("Zebras jump.\nQuick fox\n", encoding="utf-8")
    (tmp_path / "templates").mkdir()
    menu = (templates.EMBEDDED / "menu.toml").read_text(encoding="utf-8")
    (tmp_path / "templates" / "menu.toml").write_text(menu, encoding="utf-8")
    out = ("--count", 2, "--size", 192, "--workers", 1, "--kinds", "text,layout", "--out", tmp_path / "out")

    def again(corpus: str, folder: str) -> subprocess.CompletedProcess:
        return run_entry(SCRIPT, *out, "--corpus", tmp_path / corpus, "--templates", tmp_path / folder)

    first = again("corpus.txt", "templates")
    assert first.returncode == 0, first.stderr
    (tmp_path / "corpus.txt").rename(tmp_path / "moved.txt")
    (tmp_path / "templates").rename(tmp_path / "moved")
    assert again("moved.txt", "moved").returncode == 0
    (tmp_path / "moved" / "menu.toml").write_text(menu + "\n# mended\n", encoding="utf-8")
    refused = again("moved.txt", "moved")
    assert refused.returncode == 2 and "begun with other layouts (changed: menu)" in refused.stderr
    (tmp_path / "moved" / "menu.toml").write_text(menu, encoding="utf-8")
    (tmp_path / "other.txt").write_text("Zebras jump.\nQuick ox\n", encoding="utf-8")
    refused = again("other.txt", "moved")
    assert refused.returncode == 2 and "begun with other texts (changed: corpus)" in refused.stderr
