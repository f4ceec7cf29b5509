"""A run's gains: what was measured first and last of the same pictures and samples."""

import json
from pathlib import Path

import pytest

from posttrain.page import gains


def measured(folder: Path, step: int, **each: list) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"step_{step:08d}.json").write_text(json.dumps(each))


def test_only_what_was_measured_both_times_counts(tmp_path: Path):
    measured(tmp_path / "held_out", 0, key=["a", "b", "c"], loss=[3.0, 1.0, 2.0])
    measured(tmp_path / "held_out", 9, key=["c", "a"], loss=[1.5, 2.0])  # one could not be read
    found = gains(tmp_path)["loss"]
    assert (found["n"], found["value"], found["first"], found["last"]) == (2, -0.75, 2.5, 1.75)


def test_pictures_of_one_prompt_are_paired_in_order_and_scores_of_any_range_keep_theirs(tmp_path: Path):
    prompts, reward = ["p", "p", "q", "q"], [20.0, 21.0, 19.0, 22.0]
    measured(tmp_path / "validation", 0, prompt=prompts, strict=[0.0, 1.0, 0.0, 0.0], reward=reward)
    later = [20.0 + 3, 21.0 + 3, 19.0 + 3.5, 22.0 + 3.5]
    measured(tmp_path / "validation", 5, prompt=prompts, strict=[1.0, 1.0, 0.0, 1.0], reward=later)
    found = gains(tmp_path)
    assert found["strict"]["value"] == 0.5 and found["strict"]["high"] <= 1
    assert found["reward"]["value"] == 3.25 and found["reward"]["low"] < 3.25 < found["reward"]["high"]


def test_a_validation_without_prompts_has_no_gain(tmp_path: Path):
    for step in (0, 5):
        measured(tmp_path / "validation", step, light=[0.5, 0.25])
    assert gains(tmp_path) == {}


@pytest.mark.parametrize("other", [{"prompt": ["r", "s"], "strict": [1.0, 1.0]}, {"prompt": ["p", "q"], "ocr": [1, 1]}])
def test_another_validation_on_the_way_gives_no_gain(tmp_path: Path, other: dict):
    measured(tmp_path / "validation", 0, prompt=["p", "q"], strict=[0.0, 1.0])
    measured(tmp_path / "validation", 5, **other)
    assert gains(tmp_path) == {}
