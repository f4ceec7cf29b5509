"""The page of a run's health, and a user's own prompts among its samples."""

import json
from pathlib import Path

import pytest
from PIL import Image

from command_line import UserError
from training.page import POINTS, charts, write_page
from training.start import RunConfig


def rows(folder: Path, name: str, found: list[dict]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def test_a_page_is_one_file_with_the_curves_and_pictures_of_a_run(tmp_path: Path):
    steps = range(1, 2 * POINTS + 1)
    measured = [
        {"step": i, "loss": None if i == 4 else float(i), "loss/sigma/0.3-0.6": 2.0 * i, "lr": 0.1} for i in steps
    ]
    rows(tmp_path, "metrics", measured)
    rows(tmp_path, "speed", [{"step": i, "tokens_per_second": 7.0, "memory_gib": 1.0, "images": 4 * i} for i in steps])
    rows(tmp_path, "held_out", [{"step": 2, "loss": 3.0, "loss/0.3-0.6": 5.0}])
    (tmp_path / "config.toml").write_text('out = "<runs>"')
    (tmp_path / "samples").mkdir()
    for step in range(1, 20):
        Image.new("RGB", (4, 4)).save(tmp_path / "samples" / f"step_{step:08d}.png")
    found = charts(tmp_path)
    assert found["loss"]["loss"][:2] == [(1.5, 1.5), (4.0, 4.0)] and len(found["loss"]["loss"]) == POINTS
    assert found["loss by noise level"] == {"0.3-0.6": [(i + 0.5, 2.0 * i + 1) for i in steps[::2]]}
    assert found["held-out loss by noise level"] == {"0.3-0.6": [(2, 5.0)]} and "validation" not in found
    page = write_page(tmp_path).read_text()
    assert page.count("data:image/png;base64,") == 1 + 8 and "after 1 steps" in page and "after 19 steps" in page
    assert "&lt;runs&gt;" in page and "http" not in page and f"{8 * POINTS} samples seen" in page
    with pytest.raises(UserError, match="holds no metrics.jsonl"):
        write_page(tmp_path / "samples")


def test_own_prompts_are_lines_and_need_a_text_encoder(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n  two cats \n")
    (tmp_path / "text_encoder").mkdir()
    assert RunConfig(sample_prompts=file, components=tmp_path).own_prompts() == ["a red circle", "two cats"]
    with pytest.raises(UserError, match="needs a text encoder"):
        RunConfig(sample_prompts=file, components=tmp_path / "text_encoder").own_prompts()
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no prompts"):
        RunConfig(sample_prompts=file, components=tmp_path).own_prompts()
