import hashlib
import json

import cv2
import numpy as np
import pytest

from data_pipeline.synthesis import shapes_world as world

CATALOGUE_SHA256 = "bc161b1a30c1cd32662cf849b2782585adb526c3d79e99a4310edafa7a74164d"


def test_splits_are_disjoint_in_meaning_and_hold_out_what_they_say():
    meanings = {split: set() for split in world.SPLITS}
    for split in world.SPLITS:
        for tag, entries in world.catalogue(split).items():
            assert all(m["tag"] == tag for m in entries)
            for m in entries:
                meanings[split].add(world.canonical(m))
                pairs = {(c.get("color"), c["class"]) for c in m["include"]}
                held_out = bool(pairs & world.HELD_OUT_PAIRS) or any(c["count"] == 4 for c in m["include"])
                assert held_out == (split == "test-compositional")
                assert ("four" in m["prompt"]) == any(c["count"] == 4 for c in m["include"])
    for a in world.SPLITS:
        for b in world.SPLITS:
            assert a == b or not meanings[a] & meanings[b]
    for split in ("train", "validation", "test-iid"):
        assert set(world.catalogue(split)) == set(world.TAGS)
    pairs_in_train = {(c["color"], c["class"]) for m in world.catalogue("train")["colors"] for c in m["include"]}
    assert len(world.HELD_OUT_PAIRS) == round(0.2 * len(world.COLORS) * len(world.SHAPES))
    assert len(pairs_in_train) == 26


def test_every_prompt_is_unique_and_the_catalogue_is_frozen():
    entries = [m for split in world.SPLITS for tag in world.catalogue(split) for m in world.catalogue(split)[tag]]
    assert len({m["prompt"] for m in entries}) == len(entries)
    lines = "".join(world.split_of(m) + json.dumps(m, sort_keys=True) + "\n" for m in entries)
    assert hashlib.sha256(lines.encode()).hexdigest() == CATALOGUE_SHA256


def test_equivalent_prompts_share_a_canonical_form():
    left = {
        "tag": "position",
        "background": None,
        "include": [{"class": "star", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
    }
    right = {
        "tag": "position",
        "background": None,
        "include": [{"class": "circle", "count": 1}, {"class": "star", "count": 1, "position": ["right of", 0]}],
    }
    above = {
        "tag": "position",
        "background": None,
        "include": [{"class": "circle", "count": 1}, {"class": "star", "count": 1, "position": ["above", 0]}],
    }
    assert world.canonical(left) == world.canonical(right) != world.canonical(above)


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (300, 256)])
def test_renders_show_what_the_metadata_says(size):
    rng = np.random.default_rng(1)
    for tag in world.TAGS:
        for _ in range(20):
            m = world.sample_prompt(rng, "train", tag)
            placed = world.layout(m, rng, size)
            expected = sorted((c["class"], c.get("color")) for c in m["include"] for _ in range(c["count"]))
            named = "color" in m["include"][0]
            assert sorted((p.shape, p.color if named else None) for p in placed) == expected
            assert named or all((p.color, p.shape) not in world.HELD_OUT_PAIRS for p in placed)
            image = world.draw(placed, (128, 128, 128), size)
            assert image.shape == (*size, 3) and image.dtype == np.uint8
            foreground = (np.abs(image.astype(int) - 128).max(-1) > 6).astype(np.uint8)
            assert cv2.connectedComponents(foreground)[0] - 1 == len(placed)
            assert not foreground[0].any() and not foreground[:, 0].any()


def test_a_render_is_a_function_of_the_generator_and_edges_are_smooth():
    m = world.catalogue("train")["color_attr"][5]
    images = [world.render(m, np.random.default_rng(seed), (64, 64)) for seed in (3, 3, 4)]
    assert (images[0] == images[1]).all() and (images[0] != images[2]).any()
    assert len(np.unique(images[0].reshape(-1, 3), axis=0)) > 20


def test_bad_requests_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="unknown split"):
        world.sample_prompt(rng, "dev")
    with pytest.raises(ValueError, match="no prompts with tag 'position'"):
        world.sample_prompt(rng, "test-compositional", "position")
    with pytest.raises(ValueError, match="at least 32 px"):
        world.render(world.sample_prompt(rng, "train"), rng, (16, 16))
    crowd = {
        "tag": "counting",
        "prompt": "40 circles",
        "background": None,
        "include": [{"class": "circle", "count": 40}],
    }
    with pytest.raises(ValueError, match="doesn't fit"):
        world.render(crowd, rng, (64, 64))
