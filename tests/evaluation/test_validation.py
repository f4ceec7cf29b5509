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
    assert scores["strict"] >= 0.97 and scores["official"] >= scores["strict"] and scores["reward"] >= 0.97
    assert scores["strict_low"] <= scores["strict"] <= scores["strict_high"]
    assert scores["strict_floor"] < 0.2 < scores["official_floor"] < 0.6
    assert {k for k in scores if "/" in k} == {f"strict/{tag}" for tag in shapes_world.TAGS}
    blank = validation.score(lambda prompts, seeds: [np.full((64, 64, 3), 90, np.uint8)] * len(prompts), n=12)
    assert blank["strict"] == blank["official"] == blank["reward"] == 0 and blank["strict_high"] > 0.1


def test_objects_that_nobody_asked_for_are_wrong_by_the_leading_measure():
    """Every picture as it should be, with one shape more in whatever corner is free."""

    def crowded(prompts, seeds):
        pictures = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            rng = np.random.default_rng(seed)
            wanted = shapes_world.layout(BY_TEXT[prompt], rng, (96, 96))
            kinds = [s for s in shapes_world.SHAPES if s not in {p.shape for p in wanted}]
            corners = [(14.0, 14.0), (82.0, 14.0), (14.0, 82.0), (82.0, 82.0)]
            free = max(corners, key=lambda c: min(np.hypot(c[0] - p.x, c[1] - p.y) - p.radius for p in wanted))
            extra = shapes_world.Placed(kinds[0], "green", shapes_world.COLORS["green"], *free, 10.0, 0.0)
            pictures.append(shapes_world.draw([*wanted, extra], (250, 250, 250), (96, 96)))
        return pictures

    scores = validation.score(crowded, n=36)
    assert scores["official"] > 0.8 and scores["strict"] < 0.05 and scores["reward"] < 0.05


def test_every_prompt_is_drawn_with_every_seed():
    asked = []

    def generate(prompts, seeds):
        asked.extend(zip(prompts, seeds, strict=True))
        return perfect(prompts, seeds)

    validation.score(generate, n=6, seeds=(3, 4))
    assert asked == [(p.text, s) for p in shapes_prompts("validation")[:6] for s in (3, 4)]
    with pytest.raises(ValueError, match="two prompts"):
        validation.score(generate, n=1)
