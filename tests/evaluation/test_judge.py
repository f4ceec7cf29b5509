"""The bars of the judge, on pictures by the renderer that it never saw in training."""

import cv2
import numpy as np
import pytest

from data_pipeline.synthesis import shapes_world as world
from evaluation.judge import Judge, decode
from evaluation.prompts import shapes_prompts
from evaluation.scoring import score
from evaluation.suites import ShapesSuite

PER_TAG = 50


@pytest.fixture(scope="module")
def judge():
    return Judge()


def vae_like(image, rng):
    """What a mediocre VAE does to a picture: soft edges, ringing of 8 x 8 blocks, some noise, a shift of tone."""
    soft = cv2.GaussianBlur(image, (0, 0), 0.7 * (min(image.shape[:2]) / 96) ** 0.5).astype(float)
    noisy = soft * rng.uniform(0.94, 1.04) + rng.uniform(-5, 5, 3) + rng.normal(0, 6, image.shape)
    jpeg = cv2.imencode(".jpg", noisy.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
    return cv2.imdecode(jpeg, cv2.IMREAD_COLOR)


def blur(image, rng):
    return cv2.GaussianBlur(image, (0, 0), 3 * min(image.shape[:2]) / 256)


def noise(image, rng):
    return (image + rng.normal(0, 90, image.shape)).clip(0, 255).astype(np.uint8)


def pictures(tag, n, size, rng):
    entries = [world.sample_prompt(rng, "test-iid", tag) for _ in range(n)]
    return entries, [world.render(m, rng, (size, size)) for m in entries]


def share_right(judge, metadata, images):
    return np.mean([score(m, o).correct for m, o in zip(metadata, judge(images), strict=True)])


@pytest.mark.parametrize("size", [64, 256])
def test_true_pictures_are_right_after_a_vae(judge, size):
    rng = np.random.default_rng(0)
    for tag in world.TAGS:
        metadata, images = pictures(tag, PER_TAG, size, rng)
        assert share_right(judge, metadata, [vae_like(x, rng) for x in images]) >= 0.98, tag


@pytest.mark.parametrize("distort", [blur, noise])
def test_it_sees_through_blur_and_noise(judge, distort):
    rng = np.random.default_rng(1)
    for tag in world.TAGS:
        metadata, images = pictures(tag, PER_TAG, 256, rng)
        assert share_right(judge, metadata, [distort(x, rng) for x in images]) >= 0.9, tag


@pytest.mark.parametrize("size", [64, 256])
def test_blank_pictures_and_those_of_other_prompts_are_wrong(judge, size):
    rng = np.random.default_rng(2)
    suite = ShapesSuite("test-iid", judge)
    prompts = suite.prompts[:300]
    metadata = [p.metadata for p in prompts]
    others = [vae_like(suite.other(p, (size, size)), rng) for p in prompts]
    assert share_right(judge, metadata, others) <= 0.02
    blanks = [np.full((size, size, 3), rng.integers(0, 256, 3), np.uint8) for _ in prompts]
    assert share_right(judge, metadata, blanks) <= 0.02


def test_boxes_and_colours_are_those_of_the_objects(judge):
    rng = np.random.default_rng(3)
    for _ in range(20):
        placed = world.layout(world.sample_prompt(rng, "test-iid", "color_attr"), rng, (96, 160))
        (objects,) = judge([world.draw(placed, (245, 245, 245), (96, 160))])
        for p in placed:
            (found,) = objects[p.shape]
            corners = p.outline()
            assert np.abs(np.array(found.box) - [*corners.min(0), *corners.max(0)]).max() < 4
            assert found.color == p.color


def test_a_verdict_depends_on_its_picture_alone(judge):
    rng = np.random.default_rng(4)
    _, images = pictures("counting", 6, 64, rng)
    assert [judge([x])[0] for x in images] == judge(images)


def test_other_weights_are_refused(tmp_path):
    other = tmp_path / "judge.safetensors"
    other.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="not the frozen judge"):
        Judge(other)


def test_one_object_is_found_once_and_nothing_in_silence():
    import torch

    heat, color = torch.full((4, 24, 24), 0.01), torch.zeros(9, 24, 24)
    box = torch.zeros(4, 24, 24)
    box[2:] = np.log(6)
    assert decode(heat, color, box, (96, 96)) == []
    heat[0, 10, 10], heat[1, 10, 12], heat[2, 3, 20] = 0.9, 0.7, 0.6
    color[4] = 1
    found = decode(heat, color, box, (96, 96))
    assert [name for name, _ in found] == ["circle", "triangle"]
    assert found[0][1].color == "blue" and found[0][1].box == pytest.approx((30, 30, 54, 54))


def test_the_judge_learned_from_other_pictures_than_the_data():
    from evaluation import judge_pictures

    source = open(judge_pictures.__file__, encoding="utf-8").read()
    assert "shapes_world" not in source and "posttrain" not in source
    assert judge_pictures.SHAPES == world.SHAPES and judge_pictures.COLORS == tuple(world.COLORS)
    assert len(shapes_prompts("test-iid")) == 400
