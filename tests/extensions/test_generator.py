"""A generator that is no MMDiT and knows neither latents nor noise: it is validated, evaluated and rewarded unchanged.

It is autoregressive over objects: the first one is placed, then each in view of those before. Any model that gives
pictures for prompts, sizes and seeds takes its place.
"""

import json

import numpy as np
import pytest
from PIL import Image

from data_pipeline.synthesis import shapes_world
from evaluation.prompts import shapes_prompts
from evaluation.report import Result, summary
from evaluation.runner import Sampling, Source, SuiteRun
from evaluation.suites import ShapesSuite
from evaluation.validation import ShapesValidation
from rewards import WeightedRewards
from training.hooks import ValidationHook
from training.run_folder import RunFolder

MEANING = {p.text: p.metadata for split in ("validation", "test-iid") for p in shapes_prompts(split)}
"""Stands for whatever a model has learned of prompts."""


class Painter:
    """A `Generator` that paints what the prompt says, or onto the first picture that it is given to edit."""

    def generate(
        self,
        prompts: list[str],
        sizes_px: list[tuple[int, int]],
        seeds: list[int],
        images: list[list[Image.Image]] | None = None,
    ) -> list[np.ndarray]:
        """See `model.generator.Generator`."""
        images = images or [[] for _ in prompts]
        return [self._paint(*asked) for asked in zip(prompts, sizes_px, seeds, images, strict=True)]

    def _paint(self, prompt: str, size: tuple[int, int], seed: int, images: list[Image.Image]) -> np.ndarray:
        rng = np.random.default_rng([seed, *prompt.encode()])
        if not images:
            return shapes_world.render(MEANING[prompt], rng, size)
        canvas = np.array(images[0].convert("RGB").resize(size[::-1]))
        objects = shapes_world.layout(MEANING[prompt], rng, size)
        drawn = shapes_world.draw(objects, (0, 0, 0), size)
        return np.where(drawn.any(-1, keepdims=True), drawn, canvas)


def test_its_pictures_are_functions_of_their_own_prompt_size_and_seed():
    prompts = [*MEANING][:3]
    together = Painter().generate(prompts, sizes := [(64, 64), (48, 96), (64, 64)], [1, 2, 3])
    for prompt, size, seed, picture in zip(prompts, sizes, [1, 2, 3], together, strict=True):
        assert picture.dtype == np.uint8 and picture.shape == (*size, 3)
        np.testing.assert_array_equal(picture, Painter().generate([prompt], [size], [seed])[0])
    white = Image.new("RGB", (64, 64), "white")
    (edited,) = Painter().generate(prompts[:1], [(64, 64)], [1], [[white]])
    assert (edited == 255).all(-1).mean() > 0.3 and (edited != 255).any()


def test_it_is_validated_as_a_training_run_is(tmp_path):
    run = RunFolder(tmp_path, Sampling(64, 64, 0, 1.0, 1, 0))
    run.open(0)
    ValidationHook(1, run, Painter(), ShapesValidation(n=24), side_px=64)(engine=None, step=7)
    run.close()
    scores = json.loads((tmp_path / "validation.jsonl").read_text())
    assert scores["step"] == 7 and scores["strict"] >= 0.9 and scores["reward"] >= 0.9


def test_it_is_evaluated_beside_its_controls(tmp_path):
    suite = ShapesSuite("test-iid")
    source = Source("painter", "fingerprint of its weights", Painter)
    run = SuiteRun(source, suite, suite.prompts[:12], Sampling(64, 64, 0, 1.0, 2, 0), tmp_path)
    run.work(0, 1, lambda n: None)
    scores = summary(Result(run, run.read()))["scores"]
    assert scores["strict"]["value"] >= 0.9 and scores["strict"]["n"] == 24
    assert scores["strict"]["blank"]["value"] == 0 and scores["strict"]["ceiling"] is None
    assert len(list(run.drawn())) == 24


def test_it_is_rewarded():
    prompts = shapes_prompts("validation")[:12]
    texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
    pictures = Painter().generate(texts, [(64, 64)] * 12, list(range(12)))
    scores = WeightedRewards(["shapes", "shapes_soft=0.5"])(pictures, texts, metadata)
    assert scores["shapes"].mean() >= 0.9
    assert scores["reward"].tolist() == pytest.approx((scores["shapes"] + 0.5 * scores["shapes_soft"]).tolist())
    blank = WeightedRewards(["shapes"])([np.full((64, 64, 3), 90, np.uint8)] * 12, texts, metadata)
    assert blank["reward"].sum() == 0
