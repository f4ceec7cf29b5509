import cv2
import numpy as np
import pytest
import torch

from data_pipeline.synthesis import shapes_world as world
from rewards.shapes import ShapesReward, credit
from rewards.shapes_detector import detect


def pictures(n, size, split="train", seed=0):
    rng = np.random.default_rng(seed)
    metadata = [world.sample_prompt(rng, split, world.TAGS[i % 6]) for i in range(n)]
    return metadata, [world.render(m, rng, (size, size)) for m in metadata]


def reward(images, metadata):
    return ShapesReward()(images, [m["prompt"] for m in metadata], metadata)


@pytest.mark.parametrize("size", [64, 96, 256])
def test_true_pictures_get_full_credit(size):
    metadata, images = pictures(96, size)
    scores = reward(images, metadata)
    assert scores["shapes"].dtype == torch.float32 and scores["shapes"].shape == (96,)
    assert scores["shapes"].mean() >= 0.98
    assert scores["shapes_soft"].min() > 0.9
    blurred = [cv2.GaussianBlur(x, (0, 0), size / 64) for x in images]
    assert reward(blurred, metadata)["shapes"].mean() >= 0.95


@pytest.mark.parametrize("size", [64, 256])
def test_pictures_without_objects_get_nothing(size):
    metadata, _ = pictures(24, size)
    rng = np.random.default_rng(0)
    blank = [np.full((size, size, 3), rng.integers(0, 256, 3), np.uint8) for _ in metadata]
    assert (reward(blank, metadata)["shapes_soft"] == 0).all()
    noise = [rng.integers(0, 256, (size, size, 3), np.uint8) for _ in metadata]
    scores = reward(noise, metadata)
    assert (scores["shapes"] == 0).all() and scores["shapes_soft"].mean() < 0.1


def test_detections_are_the_objects_that_were_placed():
    rng = np.random.default_rng(5)
    for tag in world.TAGS:
        m = world.sample_prompt(rng, "train", tag)
        placed = world.layout(m, rng, (120, 200))
        found = detect(world.draw(placed, (250, 250, 250), (120, 200)))
        assert sorted((d.shape, d.color) for d in found) == sorted((p.shape, p.color) for p in placed)
        for p in placed:
            box = np.concatenate([p.outline().min(0), p.outline().max(0)])
            assert min(np.abs(np.array(d.box) - box).max() for d in found) < 2


def shapes(*objects):
    placed = [world.Placed(s, c, world.COLORS[c], x, y, 18, 0.0) for s, c, x, y in objects]
    return detect(world.draw(placed, (250, 250, 250), (128, 128)))


def test_soft_credit_grows_with_every_thing_done_right():
    clauses = [{"class": "circle", "count": 1, "color": "red"}, {"class": "star", "count": 1, "color": "blue"}]
    m = {"tag": "color_attr", "include": clauses}
    steps = [
        [],
        [("square", "red", 30, 30)],
        [("circle", "red", 30, 30)],
        [("circle", "red", 30, 30), ("circle", "blue", 90, 90)],
        [("circle", "red", 30, 30), ("star", "blue", 90, 90)],
    ]
    softs = [credit(shapes(*objects), m)[1] for objects in steps]
    assert softs[0] == 0 and all(a + 0.1 < b for a, b in zip(softs, softs[1:], strict=False))
    stricts = [credit(shapes(*objects), m)[0] for objects in steps]
    assert stricts == [0, 0, 0, 0, 1]
    superfluous = credit(shapes(*steps[-1], ("square", "green", 90, 30)), m)
    assert superfluous[0] == 0 and superfluous[1] < softs[-1] - 0.2


EVERYTHING = [
    ("circle", "red", 35, 35),
    ("square", "blue", 95, 35),
    ("star", "green", 35, 95),
    ("triangle", "yellow", 95, 95),
]


def test_objects_that_nobody_asked_for_do_not_pay():
    """A constant picture of all four shapes, right for .40 of the prompts by GenEval's rule, against what is asked."""
    metadata, true = pictures(120, 128, seed=3)
    everything = [world.Placed(s, c, world.COLORS[c], x, y, 18, 0.0) for s, c, x, y in EVERYTHING]
    constant = world.draw(everything, (250, 250, 250), (128, 128))
    blank = np.full((128, 128, 3), 250, np.uint8)
    shown = {"all": [constant] * 120, "blank": [blank] * 120, "true": true}
    scores = {name: reward(images, metadata) for name, images in shown.items()}
    assert not scores["all"]["shapes"].any() and scores["all"]["shapes_soft"].mean() < 0.2
    assert not scores["blank"]["shapes"].any() and not scores["blank"]["shapes_soft"].any()
    assert scores["true"]["shapes_soft"].mean() > 0.95
    one = {"tag": "single_object", "include": [{"class": "circle", "count": 1}]}
    softs = [credit(shapes(*EVERYTHING[:n]), one)[1] for n in (1, 2, 3, 4)]
    assert all(b < 0.6 * a for a, b in zip(softs, softs[1:], strict=False)) and softs[-1] > 0


def test_trying_a_second_object_costs_nothing():
    both = {"tag": "two_object", "include": [{"class": "circle", "count": 1}, {"class": "star", "count": 1}]}
    alone = credit(shapes(("circle", "red", 30, 30)), both)[1]
    wrong = credit(shapes(("circle", "red", 30, 30), ("square", "red", 90, 90)), both)[1]
    right = credit(shapes(("circle", "red", 30, 30), ("star", "red", 90, 90)), both)[1]
    assert wrong >= alone - 0.01 and right > alone + 0.4


def test_counts_and_relations():
    three = {"tag": "counting", "include": [{"class": "circle", "count": 3}]}
    row = [("circle", "red", x, y) for x, y in [(25, 25), (100, 25), (25, 100), (100, 100)]]
    assert [credit(shapes(*row[:n]), three)[0] for n in (1, 2, 3, 4)] == [0, 0, 1, 0]
    softs = [credit(shapes(*row[:n]), three)[1] for n in (1, 2, 3, 4)]
    assert softs[0] < softs[1] < softs[2] > softs[3]
    above = {
        "tag": "position",
        "include": [{"class": "circle", "count": 1}, {"class": "star", "count": 1, "position": ["above", 0]}],
    }
    places = {"right": (100, 30), "diagonal": (95, 75), "wrong": (60, 100)}
    scores = {k: credit(shapes(("star", "red", 60, 30), ("circle", "blue", *p)), above) for k, p in places.items()}
    assert [scores[k][0] for k in places] == [0, 1, 1]
    assert scores["right"][1] < 0.8 < scores["diagonal"][1]
    upside_down = credit(shapes(("star", "red", 60, 100), ("circle", "blue", 60, 30)), above)
    assert upside_down[0] == 0 and upside_down[1] < scores["right"][1]


@pytest.mark.parametrize("metadata", [{}, {"include": []}])
def test_prompts_that_name_no_objects_are_refused_by_name(metadata):
    with pytest.raises(ValueError, match="include.*'a dog'.*--rewards"):
        ShapesReward()([np.zeros((64, 64, 3), np.uint8)], ["a dog"], [metadata])


def test_metadata_of_another_world_is_refused():
    with pytest.raises(ValueError, match="doesn't know"):
        reward([np.zeros((64, 64, 3), np.uint8)], [{"prompt": "a dog", "include": [{"class": "dog", "count": 1}]}])
