import numpy as np
import pytest

from data_pipeline.synthesis import shapes_world
from evaluation import validation
from evaluation.prompts import shapes_prompts

BY_TEXT = {p.text: p.metadata for p in shapes_prompts("validation")}


def perfect(prompts, seeds):
    return [
        shapes_world.render(BY_TEXT[p], np.random.default_rng(s), (64, 64)) for p, s in zip(prompts, seeds, strict=True)
    ]


def test_true_pictures_pass_and_blank_ones_fail():
    scores = validation.score(perfect, n=36, seeds=(0, 1))
    assert scores["judge"] >= 0.97 and scores["reward"] >= 0.97
    assert scores["judge_low"] <= scores["judge"] <= scores["judge_high"]
    assert {k for k in scores if "/" in k} == {f"judge/{tag}" for tag in shapes_world.TAGS}
    blank = validation.score(lambda prompts, seeds: [np.full((64, 64, 3), 90, np.uint8)] * len(prompts), n=12)
    assert blank["judge"] == blank["reward"] == 0


def test_every_prompt_is_drawn_with_every_seed():
    asked = []

    def generate(prompts, seeds):
        asked.extend(zip(prompts, seeds, strict=True))
        return perfect(prompts, seeds)

    validation.score(generate, n=6, seeds=(3, 4))
    assert asked == [(p.text, s) for p in shapes_prompts("validation")[:6] for s in (3, 4)]
    with pytest.raises(ValueError, match="two prompts"):
        validation.score(generate, n=1)
