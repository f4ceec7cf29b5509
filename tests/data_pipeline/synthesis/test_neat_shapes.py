"""Neat pictures are true pictures of their prompts, by the judge's strict measure, and vary less."""

import numpy as np

from data_pipeline.synthesis import shapes_world as world
from data_pipeline.synthesis.neat_shapes import neatly
from evaluation.judge import Judge
from evaluation.scoring import score_strictly

SIZE = (64, 64)


def test_they_show_what_is_asked_for_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    prompts = [world.sample_prompt(rng, "train", tag) for tag in world.TAGS for _ in range(12)]
    arranged = [neatly(prompt, rng, SIZE) for prompt in prompts]
    assert all(prompt["background"] in (None, name) for prompt, (_, name, _) in zip(prompts, arranged, strict=True))
    seen = Judge()([world.draw(placed, rgb, SIZE) for placed, _, rgb in arranged])
    wrong = [p["prompt"] for p, objects in zip(prompts, seen, strict=True) if not score_strictly(p, objects).correct]
    assert not wrong


def test_shapes_stand_upright_in_four_places() -> None:
    rng = np.random.default_rng(1)
    placed = [item for _ in range(60) for item in neatly(world.sample_prompt(rng, "train"), rng, SIZE)[0]]
    assert {(item.x, item.y) for item in placed} == {(x, y) for x in (16, 48) for y in (16, 48)}
    assert {(item.radius, item.rotation) for item in placed} == {(0.17 * 64, 0.0)}
