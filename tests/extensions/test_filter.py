"""Filters of one's own in curation: a file with functions that describe themselves, named by --filters."""

import json
from pathlib import Path

import numpy as np
import pytest

from command_line import UserError
from data_pipeline.curate import Config, main
from data_pipeline.sample import RawSample
from data_pipeline.shards import list_shards, read_raw, shard_name, write_raw

MINE = """
from collections import Counter

import numpy as np

from data_pipeline.filters.description import sample_filter, set_filter


@sample_filter(keeps="at most", title="share of grey pixels")
def greyness(view):
    return float((np.ptp(view.rgb, axis=-1) < 8).mean())


@sample_filter(keeps="between", title="letters in the caption")
def letters(view):
    return float(len(view.caption))


@sample_filter(keeps="at least", title="what a network says", needs="mine")
def network(view):
    raise AssertionError("it isn't there")


@set_filter(keeps="at most", title="how many kept samples had the caption before")
def caption_seen(verdicts, thumbnail):
    seen, found = Counter(), []
    for i, verdict in enumerate(verdicts):
        assert thumbnail(i).shape == (32, 32, 3)
        found.append((float(seen[verdict.caption]), f"{verdict.key} says it again"))
        seen[verdict.caption] += 1
    return found


not_a_filter = len
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two shards of six pictures: every third is grey, every second has a caption that came before."""
    import io

    from PIL import Image

    folder, rng, samples = tmp_path / "raw", np.random.default_rng(0), []
    folder.mkdir()
    for i in range(12):
        pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
        pixels = pixels[..., :1].repeat(3, -1) if i % 3 == 0 else pixels
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
        meta = {"caption": "seen before" if i % 2 else f"a picture called {i}", "source": "shapes"}
        samples.append(RawSample(f"{'grey' if i % 3 == 0 else 'colour'}-{i}", file.getvalue(), "png", meta))
    for s in range(2):
        write_raw(folder / shard_name(s), samples[6 * s : 6 * s + 6])
    return folder


def curate(raw: Path, out: Path, *filters: str, workers: int = 1, **more) -> list[RawSample]:
    main(Config(raw, out, stages="1", filters=filters, workers=workers, **more))
    return [sample for shard in list_shards(out) for sample in read_raw(shard)]


def test_filters_of_ones_own_drop_and_are_shown(raw, mine, tmp_path, capsys):
    terms = [f"{mine}:greyness=0.5", f"{mine}:letters=5..100", f"{mine}:caption_seen=0", f"{mine}:network=1"]
    kept = curate(raw, tmp_path / "out", *terms)
    assert [s.key for s in kept] == [f"colour-{i}" for i in (1, 2, 4, 8, 10)]
    assert all(s.meta["scores"]["greyness"] < 0.5 and s.meta["scores"]["caption_seen"] == 0 for s in kept)
    audit = json.loads((tmp_path / "out/audit.json").read_text())
    rules = {f["filter"]: f for f in audit["filters"] if f["stage_name"] == "more filters"}
    assert [f["rule"] for f in rules.values()][:3] == ["greyness ≤ 0.5", "letters ≥ 5 and ≤ 100", "caption_seen ≤ 0"]
    assert {name: f["dropped"] for name, f in rules.items()} == {
        "greyness": 4, "letters": 0, "caption_seen": 3, "network": 0
    }  # fmt: skip
    assert "network: not run: no weights" in capsys.readouterr().out
    page = (tmp_path / "out/audit.html").read_text()
    assert "greyness ≤ 0.5: share of grey pixels" in page and "colour-7 says it again" in page


def test_processes_agree_and_another_version_of_the_filter_scores_again(raw, mine, tmp_path):
    term = f"{mine}:greyness=0.5"
    alone, shared = (curate(raw, tmp_path / str(n), term, workers=n) for n in (1, 2))
    assert alone == shared and len(alone) == 8
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "1").rglob("*.npy")}
    curate(raw, tmp_path / "1", term)
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "1").rglob("*.npy")}
    (tmp_path / "newer").mkdir()
    newer = tmp_path / "newer" / "mine.py"
    newer.write_text(MINE.replace("< 8", "< 0"))
    assert len(curate(raw, tmp_path / "1", f"{newer}:greyness=0.5")) == 12


def test_ones_of_ours_can_be_added_too(raw, tmp_path):
    kept = curate(raw, tmp_path / "out", "saturation=0.01", "luma=0.1..0.9")
    assert [s.key for s in kept] == [f"grey-{i}" for i in (0, 3, 6, 9)]


def test_bad_terms_are_named(raw, mine, tmp_path):
    (tmp_path / "taken.py").write_text(MINE.replace("greyness", "clarity"))
    for term, says in (
        (f"{mine}:greyness", r"expected .*greyness=THRESHOLD"),
        (f"{mine}:greyness=much", r"expected .*greyness=THRESHOLD"),
        (f"{mine}:letters=5", r"expected .*letters=LOW..HIGH"),
        (f"{mine}:not_a_filter=1", "is no filter"),
        (f"{mine}:absent=1", "has no absent"),
        (f"{tmp_path}/none.py:x=1", "does not exist"),
        (f"{tmp_path}/taken.py:clarity=1", "is called clarity"),
        ("beauty=1", "unknown filter 'beauty'; known are broken"),
    ):
        with pytest.raises(UserError, match=says):
            curate(raw, tmp_path / "out", term, dry_run=True)
