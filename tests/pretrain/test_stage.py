"""pretrain/stage.py as a user runs it: on its flags, on bad input, on its own and another run's checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from stage_runs import ROOT, make_data, stage

from command_line import from_dict, read_toml
from pretrain.recipes import STAGES, StageConfig, recipe
from training.engine.checkpoint import list_checkpoints
from training.run_folder import read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, components: Path) -> dict[int, Path]:
    from vae.autoencoder import VAE

    folders = {side: tmp_path_factory.mktemp(f"data{side}") for side in (64, 96)}
    vae = VAE.from_folder(components).fingerprint()
    return {side: make_data(folder, side, vae=vae) for side, folder in folders.items()}


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vae.autoencoder import PRESETS, VAE

    folder = tmp_path_factory.mktemp("components")
    torch.manual_seed(0)
    VAE(PRESETS["tiny"]).save(folder)
    return folder


def test_two_stages_of_the_curriculum(data: dict, components: Path, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    common = ["--batch-size", 2, "--components", components, "--sample-every", 2]
    status, out, err = stage("--data", data[64], "--out", first, "--steps", 3, *common)
    assert status == 0, err
    [line] = out.splitlines()
    assert (
        "tiny MMDiT (8,208,576 parameters) from random weights" in line
        and "stage 256 at 64 px" in line
        and str(data[64]) in line
    )
    assert sorted(p.name for p in (first / "samples").iterdir()) == ["step_00000002.png", "step_00000003.png"]
    assert Image.open(first / "samples" / "step_00000003.png").height == 80
    assert [row["step"] for row in read_metrics(first)] == [1, 2, 3]
    assert list((first / "tensorboard").iterdir())

    # config.toml takes the run back; a longer one goes on where this one ended.
    config = from_dict(StageConfig, read_toml(first / "config.toml"))
    assert config.data == (data[64],) and config.loop.steps == 3 and config.engine == recipe(256).engine
    status, _, err = stage("--config", first / "config.toml", "--steps", 4)
    assert status == 0, err
    assert [row["step"] for row in read_metrics(first)] == [1, 2, 3, 4]

    arguments = ["--res", 640, "--data", data[96], "--init", first, "--out", second, "--steps", 2]
    status, _, err = stage(*arguments, "--tp", 2, "--sp", *common, ranks=2)
    assert status == 0, err
    assert list_checkpoints(second / "checkpoints")[0].name == "step_00000002"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--res", "512"], "there is no stage 512; stages are 256, 640, 1328"),
        (["--data", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (
            ["--res", "640", "--init", "random", "--data", "DATA"],
            "was encoded at 64 px, stage 640 of preset tiny trains at 96 px",
        ),
        (["--preset", "small", "--dtype", "float32", "--data", "WIDE"], "text states of width 128, preset small takes"),
        (["--data", "DATA", "--tp", "2", "--out", "OUT"], "1 processes do not divide over tp 2 x cp 1"),
        (["--data", "DATA", "--out", "OUT", "--init", "DATA"], "holds no model"),
        (["--data", "DATA", "--out", "OUT", "--max-tokens", "20"], "raise max_tokens"),
        (["--preset", "qwen-image"], "preset qwen-image needs --data"),
        (["--density", "uniform", "--density-std", ".7"], "are of the logit-normal density, not of uniform"),
        (["--density-std", "0"], "a spread is above 0"),
        (["--shift", "0"], "a factor is above 0"),
        (["--ema-half-life", "0"], "a number of images is above 0"),
        (["--data", "DATA", "--shares", "1", "--batch-tokens", "99"], "not for --shares"),
        (["--data", "DATA", "--batch-tokens", "3", "--out", "OUT"], "may leave some of the 1 data-parallel ranks"),
    ],
)
def test_bad_input_is_one_clear_line(data: dict, tmp_path: Path, arguments: list[str], words: str):
    wide = make_data(tmp_path / "wide", 256) if "WIDE" in arguments else ""
    places = {"DATA": str(data[64]), "OUT": str(tmp_path / "out"), "WIDE": str(wide)}
    status, _, err = stage(*[places.get(a, a) for a in arguments])
    message = status if isinstance(status, str) else err
    assert status != 0 and words in message and len(message.strip().splitlines()) == 1
    assert not list(tmp_path.glob("out/checkpoints/*"))


def test_a_run_of_another_model_is_refused(data: dict, tmp_path: Path):
    status, _, err = stage("--data", data[64], "--out", tmp_path, "--steps", 1, "--batch-size", 2)
    assert status == 0, err
    state = tmp_path / "checkpoints" / "step_00000001" / "state.json"
    assert json.loads(state.read_text())["model"]["num_layers"] == 6
    wide = make_data(tmp_path / "wide", 256, width=3584)
    status, _, err = stage("--preset", "small", "--data", wide, "--init", tmp_path, "--out", tmp_path / "other")
    assert status == 2 and "is of another model: " in err and "num_layers is 6 there, 10 here" in err
    assert len(err.strip().splitlines()) == 1


def test_settings_import_no_torch():
    code = "import sys, pretrain.recipes, training.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_plan_of_the_large_model():
    status, out, _ = stage("--res", 1328, "--preset", "qwen-image", "--dry-run")
    assert status == 0
    assert "text none 0.96, words 0.01" in " ".join(out.split()) and "minimum aesthetics 5@0 5.5@1" in out
    assert "20,430,401,088 parameters" in out and "6889 image" in out and "tp 4 with sp x cp 1 x dp 2" in out


def test_recipes_are_what_they_say():
    assert list(STAGES) == [256, 640, 1328]
    for res in STAGES:
        assert recipe(res, "qwen-image").res == recipe(res, "small").res == recipe(res, "tiny").res == res
        assert recipe(res, "tiny").side_px() % 16 == 0 and recipe(res, "small").side_px() == res
    with pytest.raises(ValueError, match="stages are"):
        recipe(512)
