"""Stages one after the other: what each starts from, and the command that runs them all, interrupted or not."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from stage_runs import curriculum, entry, make_data, stage
from worlds import run_world

from command_line import UserError
from pretrain.before import described, start_of
from pretrain.recipes import CurriculumConfig, recipe
from training.run_folder import read_metrics
from training.source import AT_RANDOM


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [make_data(tmp_path_factory.mktemp(f"data{side}"), side) for side in (64, 96)]


def write(file: Path, out: Path, data: list[Path], more: str = "") -> Path:
    """A recipe of two stages of two steps."""
    common = "[common]\nbatch_size = 2\nvalidate_every = 0\n[common.loop]\nsteps = 2\n"
    places = f'out = "{out}"\ndata = {json.dumps([str(d) for d in data])}\n'
    file.write_text(f"{places}{common}[stages.256]\n[stages.640]\n{more}")
    return file


def interrupted(rank: int, arguments: list[str]) -> tuple[object, str, str]:
    """The command, which gets a signal in the first step of its second stage."""
    from training.run_folder import RunFolder

    log = RunFolder.log

    def logged(run: RunFolder, step: int, *values: dict) -> None:
        log(run, step, *values)
        if run.path.name == "pretrain-640":
            os.kill(os.getpid(), signal.SIGINT)

    RunFolder.log = logged
    return entry(rank, arguments, None, "curriculum")


def test_one_command_runs_all_stages_and_goes_on_where_it_was(data: list[Path], tmp_path: Path):
    whole, cut = (["--config", str(write(tmp_path / f"{n}.toml", tmp_path / n, data))] for n in "ab")
    status, out, err = curriculum(*whole)
    assert status == 0, err
    assert "from random weights, stage 256 at 64 px" in out
    assert f"from {tmp_path}/a/pretrain-256 (step 2, 4 samples seen), stage 640 at 96 px" in out

    shutil.copytree(tmp_path / "a" / "pretrain-256", tmp_path / "b" / "pretrain-256")
    status, _, err = run_world(1, interrupted, cut)[0]
    assert status == 130 and "run the same command to go on" in err
    assert len(read_metrics(tmp_path / "b" / "pretrain-640")) == 1
    status, out, err = curriculum(*cut)
    assert status == 0, err
    assert f"stage 256 is finished: {tmp_path}/b/pretrain-256 (step 2, 4 samples seen)" in out
    a, b = (read_metrics(tmp_path / name / "pretrain-640") for name in "ab")
    assert a == b and len(a) == 2
    status, out, _ = curriculum(*cut)
    assert status == 0 and out.count("is finished") == len(out.splitlines()) == 2

    # A single stage takes up the run of the one before in the same way, and only a finished one.
    place = tmp_path / "a" / "pretrain-640-again"
    assert start_of(640, place, None) == tmp_path / "a" / "pretrain-256"
    settings = tmp_path / "a" / "pretrain-256" / "config.toml"
    settings.write_text(settings.read_text().replace("steps = 2", "steps = 3"))
    with pytest.raises(UserError, match="has done 2 of 3 steps: run `pretrain/stage.py --res 256` to its end"):
        start_of(640, place, None)


def test_random_weights_above_256_are_a_choice(data: list[Path], tmp_path: Path):
    common = ["--res", 640, "--data", data[1], "--batch-size", 2, "--out", tmp_path / "pretrain-640"]
    status, _, err = stage(*common)
    assert status == 2 and len(err.strip().splitlines()) == 1
    assert f"{tmp_path}/pretrain-256 has no checkpoint" in err and "--init PATH, or --init random" in err
    status, out, err = stage(*common, "--init", "random", "--steps", 1)
    assert status == 0 and "from random weights" in out, err
    assert start_of(640, tmp_path / "pretrain-640", None) == AT_RANDOM  # the run goes on, whatever there is before it
    with pytest.raises(UserError, match="started from random, not from other; choose another --out"):
        start_of(640, tmp_path / "pretrain-640", Path("other"))


def test_a_plan_waits_for_no_run(tmp_path: Path):
    assert start_of(256, tmp_path / "pretrain-256", None) is None
    place = start_of(1328, tmp_path / "pretrain-1328", None, may_wait=True)
    assert place == tmp_path / "pretrain-640" and "still to be trained" in described(place)
    assert described(AT_RANDOM) == described(None) == "random weights"
    status, out, err = curriculum("--dry-run", "--out", tmp_path)
    assert status == 0 and out.count("FLOPs") == 3 and "resolutions 640 1@0 0@0.5, 1328 0@0 1@0.5" in out, err


def test_a_recipe_changes_all_stages_or_one():
    config = CurriculumConfig(
        common={"condition_dropout": 0.3, "loop": {"steps": 7}, "rope": "text-first"},
        stages={
            "640": {"engine": {"optimizer": {"lr": 0.5}}, "init": "random"},
            "1328": {"draws": {"text": {"none": 1}}},
        },
    )
    first, last = config.stage_configs()
    assert (first.condition_dropout, first.loop.steps, first.model.rope) == (0.3, 7, "text-first")
    assert first.engine.optimizer.lr == 0.5 and last.engine == recipe(1328).engine
    assert first.init == AT_RANDOM and last.init == first.out == Path("runs/pretrain-640")
    assert last.draws.text == {"none": ((0.0, 1.0),)} and last.loop.save_every == recipe(1328).loop.save_every
    with pytest.raises(UserError, match="there is no stage 512"):
        CurriculumConfig(stages={"512": {}}).stage_configs()
    own = CurriculumConfig(
        data=(Path("all"),), common={"preset": "qwen-image", "engine": {"ema_decay": 0.5}},
        stages={"640": {"data": ["a", "b"]}, "1328": {"preset": "tiny"}},
    ).stage_configs()  # fmt: skip
    assert [stage.preset for stage in own] == ["qwen-image", "tiny"] and own[0].data == (Path("a"), Path("b"))
    assert own[0].batch_size == recipe(640, "qwen-image").batch_size and own[0].with_average().engine.ema_decay == 0.5
    for table, message in (
        ({"rope": "text_first"}, "stages.640.rope should be one of msrope, text-first, scaling, is 'text_first'"),
        ({"engine": {"optimizer": {"schedule": "linear"}}}, "schedule should be one of constant, cosine, wsd"),
        ({"out": "elsewhere"}, "stages.640: out cannot be a stage's own"),
    ):
        with pytest.raises(UserError, match=message):
            CurriculumConfig(stages={"640": table}).stage_configs()
    with pytest.raises(UserError, match="stages.640: unknown name lr"):
        CurriculumConfig(stages={"640": {"lr": 1}}).stage_configs()


def test_a_file_chooses_the_recipe_that_it_changes(tmp_path: Path):
    file = tmp_path / "large.toml"
    file.write_text('res = 1328\npreset = "qwen-image"\ninit = "random"\n[engine.optimizer]\nclip = 0.5\n')
    status, out, err = stage("--config", file, "--dry-run", "--gpu", "256xH100")
    assert status == 0 and "aesthetics 5@0 5.5@1" in out and "20,4" in out, err
    status, out, err = stage("--config", file, "--preset", "tiny", "--dry-run")  # flags go on top
    assert status == 0 and "aesthetics" not in out, err


def test_stages_that_come_later_are_checked_first(data: list[Path], tmp_path: Path):
    file = write(tmp_path / "c.toml", tmp_path / "c", data, "shift = 0.0\n")
    status, out, err = curriculum("--config", file)
    assert status == 2 and "--shift 0.0: a factor is above 0" in err and not (tmp_path / "c").exists()


def test_data_of_each_resolution_are_asked_for_before_the_first_stage(data: list[Path], tmp_path: Path):
    status, out, err = curriculum("--config", write(tmp_path / "c.toml", tmp_path / "c", data[:1]))
    assert status == 2 and "stage 640 trains at 96 px, and nothing in --data was encoded at that" in err
    assert not (tmp_path / "c").exists() and not out
