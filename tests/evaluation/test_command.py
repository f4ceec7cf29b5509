"""`python -m evaluation` as it is used: on a run and its export, by several processes, killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import UserError, write_toml
from data_pipeline.sample import EncodedSample
from evaluation.__main__ import Config, main
from evaluation.runner import read_picture
from model.config import MMDiTConfig
from model.diffusers_io.folder import write_pipeline
from model.tiny_components import write_tiny_components
from training.engine.checkpoint import read_weights
from training.engine.config import EngineConfig, OptimizerConfig
from training.engine.step import Engine
from training.flow_matching import VelocityMSE
from training.randomness import Randomness
from vae.autoencoder import VAE
from vae.config import PRESETS

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {"images_per_prompt": 2, "steps": 2, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A run folder with one checkpoint, and its export."""
    folder = tmp_path_factory.mktemp("models")
    components, run = folder / "components", folder / "run"
    write_tiny_components(components, seed=0)
    torch.manual_seed(0)
    VAE(PRESETS["tiny"]).save(components)
    config = MMDiTConfig(2, 2, 24, joint_attention_dim=128, axes_dims_rope=(4, 10, 10))
    engine = Engine(config, EngineConfig(optimizer=OptimizerConfig(lr=0.05, warmup_steps=0)), total_steps=1)
    try:
        engine.initialize(seed=0)
        sample = EncodedSample("a", torch.randn(16, 1, 8, 8), torch.randn(5, 128), txt_empty=torch.randn(3, 128))
        engine.step(VelocityMSE(), [[sample]], Randomness(0))
        (run / "checkpoints").mkdir(parents=True)
        engine.save(run / "checkpoints" / "step_00000001", {})
    finally:
        engine.close()
    write_toml({"components": components}, run / "config.toml")
    write_pipeline(folder / "export", *read_weights(run, ema=False), components)
    return run, folder / "export"


def scores(output: Path) -> dict[str, dict]:
    return {p.parent.name: json.loads(p.read_text()) for p in sorted(output.glob("*/scores.json"))}


def test_a_run_and_its_export_get_the_same_scores(models, tmp_path):
    names = tuple(map(str, models))
    main(Config(compare=names, suite=("shapes",), split="validation", limit=6, ema=False, output=tmp_path, **FLAGS))
    found = scores(tmp_path)
    one, two = (v["suites"] for k, v in found.items() if "-vs-" not in k)
    assert one == two
    (between,) = (v for k, v in found.items() if "-vs-" in k)
    strict = between["differences"][names[1]]["shapes/validation"]["strict"]
    assert strict["value"] == 0 and not strict["significant"]
    first, second = (sorted(p.glob("*.png")) for p in sorted((tmp_path / "cache").iterdir()))
    assert len(first) == len(second) == 12
    for a, b in zip(first, second, strict=True):
        x, y = read_picture(a).astype(int), read_picture(b).astype(int)
        assert np.abs(x - y).max() <= 1 and x.std() > 3, "same picture to 1e-3 before rounding to 8 bits"


def test_what_is_measured_otherwise_replaces_nothing(models, tmp_path):
    flags = {**FLAGS, "checkpoint": str(models[1]), "limit": 2, "output": tmp_path}
    for split in ("validation", "test-iid", "test-iid"):
        main(Config(split=split, **flags))
    assert sorted(*zip(*(data["suites"] for data in scores(tmp_path).values()), strict=True)) == [
        "shapes/test-iid",
        "shapes/validation",
    ]


def test_what_cannot_run_is_said(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("evaluation.ocr.shutil.which", lambda name: None)
    flags = {**FLAGS, "checkpoint": str(models[1]), "limit": 2, "output": tmp_path}
    main(Config(suite=("shapes", "text"), split="validation", **flags))
    assert "text: not run (Tesseract is not installed" in capsys.readouterr().out
    (data,) = scores(tmp_path).values()
    assert "Tesseract" in data["not run"]["text"] and "--pictures.clip" in data["not run"]["clip"]
    with pytest.raises(UserError, match="Tesseract is not installed"):
        main(Config(suite=("text",), **flags))
    with pytest.raises(UserError, match="geneval needs"):
        main(Config(suite=("geneval",), prompts=tmp_path / "x.jsonl", **flags))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"checkpoint": "nowhere/at/all"}, "nowhere"),
        ({"compare": ("one",)}, "two models"),
        ({"height": 50}, "multiples of 16"),
        ({"limit": 1}, "2 prompts"),
        ({"suite": ("shapes", "edit"), "prompts": Path("x")}, "belongs to one suite"),
        ({"inception": Path("x")}, "both --inception"),
    ],
)
def test_bad_requests_end_in_one_line(change, words, tmp_path):
    with pytest.raises((UserError, ValueError), match=words):
        main(Config(**{"output": tmp_path, **change}))
    assert not list(tmp_path.iterdir())


def test_the_vae_is_measured_alone(models, tmp_path, capsys):
    main(Config(checkpoint=str(models[1]), suite=("vae",), limit=3, output=tmp_path))
    (data,) = scores(tmp_path).values()
    table = data["suites"]["vae"]
    assert sum(measures["psnr"]["n"] for measures in table.values()) == 3
    assert all(0 < measures["psnr"]["value"] < 30 for measures in table.values()), "a random VAE"
    assert "psnr" in capsys.readouterr().out and (next(tmp_path.iterdir()) / "index.html").is_file()
    main(Config(checkpoint=str(models[1]), suite=("vae",), limit=2, output=tmp_path))
    assert sum(1 for _ in tmp_path.iterdir()) == 2, "another limit is another measurement"
    with pytest.raises(UserError, match="run of its own"):
        main(Config(suite=("vae", "shapes"), output=tmp_path))


def command(output: Path, checkpoint: Path, *words: str) -> list[str]:
    flags = ["--checkpoint", checkpoint, "--output", output, "--suite", "shapes", "--limit", 16]
    size = ["--images-per-prompt", 2, "--steps", 2, "--height", 64, "--width", 64]
    return [*words, "-m", "evaluation", *map(str, [*flags, *size])]


@pytest.mark.slow
def test_killed_and_shared_runs_write_the_same_scores(models, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = {"cwd": ROOT, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    whole, cut, shared = (tmp_path / name for name in ("whole", "cut", "shared"))
    subprocess.run(command(whole, models[1], sys.executable), check=True, timeout=600, **start)
    for rows in (1, 3):
        process = subprocess.Popen(command(cut, models[1], sys.executable), **start)
        while process.poll() is None and len(list(cut.rglob("batch-*.json"))) < rows:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(cut, models[1], sys.executable), check=True, timeout=600, **start)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(command(shared, models[1], *torchrun), check=True, timeout=600, **start)
    assert scores(whole) == scores(cut) == scores(shared) and scores(whole)
