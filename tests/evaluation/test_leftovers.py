"""Things in a picture that no detector names."""

import cv2
import numpy as np
import pytest

from data_pipeline.synthesis import shapes_world as world
from evaluation.judge import Judge
from evaluation.leftovers import has_leftovers
from evaluation.scoring import Found
from evaluation.suites import true_objects


def soften(image, rng):
    """Blur, a shift of tone and noise, as a mediocre VAE leaves."""
    soft = cv2.GaussianBlur(image, (0, 0), 0.7 * (min(image.shape[:2]) / 96) ** 0.5).astype(float)
    return (soft * rng.uniform(0.94, 1.04) + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (256, 256)])
def test_true_pictures_have_none_and_without_one_of_their_objects_they_have(size):
    rng, judge = np.random.default_rng(0), Judge()
    for i in range(30):
        metadata = world.sample_prompt(rng, "test-iid", world.TAGS[i % 6])
        placed = world.layout(metadata, rng, size)
        background = list(world.BACKGROUNDS.values())[rng.integers(len(world.BACKGROUNDS))]
        image = soften(world.draw(placed, background, size), rng)
        assert not has_leftovers(image, true_objects(placed)) and not has_leftovers(image, judge([image])[0])
        assert has_leftovers(image, true_objects(placed[1:]))


def test_smears_count_and_specks_noise_and_slow_shades_do_not():
    image = np.full((96, 96, 3), 240, np.uint8)
    cv2.circle(image, (30, 30), 14, (200, 30, 30), -1)
    objects = {"circle": [Found((16, 16, 45, 45), 0.9, "red")]}
    assert not has_leftovers(image, objects)
    assert has_leftovers(image, {})
    smeared = image.copy()
    smeared[60:75, 55:85] = (150, 200, 160)
    assert has_leftovers(smeared, objects)
    specks = image.copy()
    specks[70:73, 70:73] = 0
    assert not has_leftovers(specks, objects)
    shaded = (image * np.linspace(0.92, 1, 96)[:, None, None]).astype(np.uint8)
    assert not has_leftovers(shaded, objects)
    everything = {"square": [Found((0, 0, 96, 96), 0.9, "red")]}
    assert not has_leftovers(smeared, everything)
