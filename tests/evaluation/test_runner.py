"""Caching, restarts and sharing of work, with a model that draws noise in no time."""

import json

import numpy as np
import pytest
from PIL import Image

from evaluation import runner
from evaluation.prompts import Prompt
from evaluation.report import Result, comparison, summary, write_comparison, write_scores
from evaluation.runner import Sampling, Source, SuiteRun, diversity, picture_seed
from model.text_to_image import TextToImage

SAMPLING = Sampling(32, 48, 2, 1.0, 4, 0)


class Maker:
    """A picture's brightness is a function of prompt and seed; `skill` makes it brighter."""

    def __init__(self, skill=0.0, dies_at=None):
        self.skill, self.calls, self.dies_at = skill, [], dies_at

    def generate(self, prompts, sizes_px, seeds, images):
        if self.dies_at is not None and len(self.calls) >= self.dies_at:
            raise KeyboardInterrupt
        self.calls.append(list(prompts))
        levels = [
            np.random.default_rng([s, *p.encode()]).random() * 0.5 + self.skill
            for p, s in zip(prompts, seeds, strict=True)
        ]
        return [np.full((*size, 3), round(255 * v), np.uint8) for size, v in zip(sizes_px, levels, strict=True)]

    def reconstruct(self, picture):
        return picture


class Brightness:
    name, primary, bounds, fingerprint = "brightness", "light", {"light": (0.0, 1.0)}, "1"

    def __init__(self, n=20):
        self.prompts = [Prompt(f"b/{i:02d}", f"prompt {i}", "odd" if i % 2 else "even", {}) for i in range(n)]

    def score(self, images, prompts):
        return {"light": [float(i.mean()) / 255 for i in images]}

    def truth(self, prompt, size):
        return None if prompt.id == "b/03" else np.full((*size, 3), 200, np.uint8)

    def other(self, prompt, size):
        return None

    def sources(self, prompt, size):
        return []

    def constants(self, size):
        return {}


def new_run(cache, maker, suite=None, sampling=SAMPLING, source="a"):
    suite = suite or Brightness()
    return SuiteRun(Source(source, source, lambda: maker), suite, suite.prompts, sampling, cache)


def done(run, ranks=1):
    for rank in range(ranks):
        run.work(rank, ranks, lambda n: None)
    return Result(run, run.read())


def test_processes_share_the_work_and_change_nothing(tmp_path):
    makers = [Maker() for _ in range(4)]
    one = done(new_run(tmp_path / "one", makers[0]))
    parts = [new_run(tmp_path / "three", m) for m in makers[1:]]
    for rank, part in enumerate(parts):
        part.work(rank, 3, lambda n: None)
    assert parts[0].read() == one.rows
    drawn = [p for m in makers[1:] for call in m.calls for p in call]
    assert sorted(drawn) == sorted(p for call in makers[0].calls for p in call) and len(drawn) == 80
    assert all(m.calls for m in makers)


@pytest.mark.parametrize("dies_at", [0, 1, 3])
def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path, dies_at):
    whole = done(new_run(tmp_path / "whole", Maker()))
    with pytest.raises(KeyboardInterrupt):
        done(new_run(tmp_path / "cut", Maker(dies_at=dies_at)))
    rest = Maker()
    assert done(new_run(tmp_path / "cut", rest)).rows == whole.rows
    assert len(rest.calls) == 5 - dies_at
    nothing = Maker(dies_at=0)
    assert done(new_run(tmp_path / "cut", nothing)).rows == whole.rows


def test_a_half_drawn_batch_is_drawn_again_whole(tmp_path):
    run = new_run(tmp_path, Maker())
    expected = done(run).rows
    (run.rows / "batch-00001.json").unlink()
    run.picture_file(run.prompts[5], 2).unlink()
    maker = Maker()
    assert done(new_run(tmp_path, maker)).rows == expected
    assert maker.calls == [[p.text for p in run.prompts[4:8] for _ in range(4)]]


def test_the_cache_is_told_apart_by_model_sampling_prompts_and_judge(tmp_path, monkeypatch):
    base = new_run(tmp_path, Maker())
    other_steps = new_run(tmp_path, Maker(), sampling=Sampling(32, 48, 3, 1.0, 4, 0))
    other_model = new_run(tmp_path, Maker(), source="b")
    fewer = new_run(tmp_path, Maker(), suite=Brightness(10))
    assert len({r.pictures for r in (base, other_steps, other_model, fewer)}) == 4
    stricter = Brightness()
    stricter.fingerprint = "2"
    judged_again = new_run(tmp_path, Maker(), suite=stricter)
    assert judged_again.pictures == base.pictures and judged_again.rows != base.rows
    done(base)
    untouched = Maker(dies_at=0)
    done(new_run(tmp_path, untouched, suite=stricter))
    monkeypatch.setattr(runner, "hash_files", lambda paths: "other code")
    assert new_run(tmp_path, Maker()).pictures != base.pictures


def test_seeds_belong_to_the_prompt(tmp_path):
    prompts = Brightness().prompts
    seeds = {picture_seed(p, SAMPLING, j) for p in prompts for j in range(4)}
    assert len(seeds) == 80 and all(0 <= s < 2**31 for s in seeds)
    more = Sampling(64, 64, 9, 4.0, 8, 0)
    assert picture_seed(prompts[3], SAMPLING, 2) == picture_seed(prompts[3], more, 2)
    assert picture_seed(prompts[3], SAMPLING, 2) != picture_seed(prompts[3], Sampling(32, 48, 2, 1.0, 4, 1), 2)


def test_controls_and_strata_stand_beside_the_score(tmp_path):
    table = summary(done(new_run(tmp_path, Maker())))["scores"]
    light = table["light"]
    assert light["n"] == 80 and light["prompts"] == 20 and light["low"] < light["value"] < light["high"]
    assert light["ceiling"]["value"] == pytest.approx(200 / 255) and light["ceiling"]["n"] == 19
    assert light["blank"]["n"] == light["other"]["n"] == 20
    assert light["value"] == pytest.approx(np.mean([light["by kind"][k]["value"] for k in ("even", "odd")]))
    assert 0 < table["diversity"]["value"] < 0.5 and table["diversity"]["ceiling"] is None


def test_comparison_is_paired(tmp_path):
    a, b = (done(new_run(tmp_path, Maker(skill), source=str(skill))) for skill in (0.0, 0.01))
    light = comparison(a, b)["light"]
    assert light["value"] == pytest.approx(0.01, abs=0.003) and light["significant"]
    assert light["high"] - light["low"] < 0.002
    assert not comparison(a, a)["light"]["significant"]


def test_what_is_significant_is_corrected_over_measures_and_over_kinds(tmp_path, monkeypatch):
    a, b = (done(new_run(tmp_path, Maker(skill), source=str(skill))) for skill in (0.0, 0.01))
    p_values = {"light": 0.03, "diversity": 0.04}
    monkeypatch.setattr(
        "evaluation.report.p_value", lambda a, b, paired, bounds: p_values["light" if bounds else "diversity"]
    )
    table = comparison(a, b)
    assert table["light"]["p"] == table["diversity"]["p"] == pytest.approx(0.06)
    assert not table["light"]["significant"] and not table["light"]["by kind"]["odd"]["significant"]
    assert table["light"]["by kind"]["odd"]["p"] == pytest.approx(0.12)
    p_values["diversity"] = 0.5
    assert not comparison(a, b)["light"]["significant"]
    p_values["light"] = 0.01
    assert comparison(a, b)["light"]["significant"]


def test_the_best_constant_picture_is_the_floor_of_its_own_measure(tmp_path):
    class WithConstant(Brightness):
        def score(self, images, prompts):
            light = [float(i.mean()) / 255 for i in images]
            return {"light": light, "dark": [1 - v for v in light]}

        def constants(self, size):
            return {"light": np.full((*size, 3), 255, np.uint8), "dark": np.zeros((*size, 3), np.uint8)}

    table = summary(done(new_run(tmp_path, Maker(), suite=WithConstant())))["scores"]
    assert table["light"]["constant"]["value"] == table["dark"]["constant"]["value"] == 1
    assert table["light"]["constant"]["n"] == 20 and table["diversity"]["constant"] is None


def test_files_are_written_and_valid(tmp_path):
    results = [done(new_run(tmp_path, Maker(skill), source=str(skill))) for skill in (0.0, 0.1)]
    sources = [r.run.source for r in results]
    write_scores(tmp_path / "x", sources[0], {"steps": 2}, [results[0]], {"text": "no engine"})
    data = json.loads((tmp_path / "x/scores.json").read_text())
    assert data["suites"]["brightness"]["scores"]["light"]["ceiling"]["value"] > 0.7 and data["not run"]
    page = (tmp_path / "x/index.html").read_text()
    assert page.count("data:image/jpeg") == 20 and "no engine" in page and "prompt 7" in page
    sheet = Image.open(tmp_path / "x/brightness.png")  # 20 prompts: rows of 16
    assert sheet.size == (16 * (48 + 4), 2 * (48 + 4)) and sheet.getpixel((24, 24)) != (255, 255, 255)
    write_comparison(tmp_path / "y", {"steps": 2}, sources, [[r] for r in results])
    differences = json.loads((tmp_path / "y/scores.json").read_text())["differences"]
    assert differences["0.1"]["brightness"]["light"]["significant"]
    assert (tmp_path / "y/index.html").read_text().count("data:image/jpeg") == 40


def test_diversity_is_distance():
    black, white = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
    assert diversity([black, black]) == 0 and diversity([black, white]) == 1
    assert diversity([black, white, white]) == pytest.approx(2 / 3)


def test_reconstruction_goes_through_the_vae():
    class Vae:
        def encode_latent(self, pixels):
            return pixels

        def decode_latent(self, latent):
            return latent

    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    assert (TextToImage(None, None, Vae()).reconstruct(picture) == picture).all()
