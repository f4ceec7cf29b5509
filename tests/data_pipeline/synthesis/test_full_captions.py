"""Captions that say all: true of their pictures, and silent about what is held out."""

import numpy as np
import pytest

from data_pipeline.synthesis import shapes_world as world
from data_pipeline.synthesis.full_captions import full_caption
from data_pipeline.synthesis.kinds import FULL_CAPTIONS, Recipe

PICTURES = 4000


@pytest.fixture(scope="module")
def captions() -> list[tuple[dict, list[world.Placed], str, str]]:
    """(metadata, shapes, background, caption) of training pictures."""
    rng, found = np.random.default_rng(0), []
    for _ in range(PICTURES):
        metadata = world.sample_prompt(rng, "train")
        placed, name, _ = world.arrange(metadata, rng, (64, 64))
        found.append((metadata, placed, name, full_caption(metadata, placed, name, rng)))
    return found


def head_of(caption: str) -> str:
    return caption.split(" on a ")[0]


def test_what_is_said_is_true(captions):
    said = {"more": 0, "color": 0, "background": 0, "relation": 0}
    for metadata, placed, background, caption in captions:
        said["more"] += caption != metadata["prompt"]
        if caption == metadata["prompt"]:
            continue
        if " on a " in caption:
            assert caption.endswith(f" on a {background} background")
            said["background"] += metadata.get("background") is None
        words = head_of(caption).split()
        colors = [w for w in words if w in world.COLORS]
        assert sorted(set(colors)) == sorted({p.color for p in placed})
        said["color"] += not any("color" in c for c in metadata["include"])
        for relation in (r for r in world.RELATIONS if f" {r} " in f" {head_of(caption)} "):
            first, second = (placed[0], placed[-1]) if colors[0] == placed[0].color else (placed[-1], placed[0])
            if placed[0].color != placed[-1].color:
                assert world.relation_holds(first, second, relation), caption
            said["relation"] += metadata["tag"] != "position"
    assert said["more"] > PICTURES / 2 and all(n > PICTURES / 50 for n in said.values()), said


def test_no_held_out_prompt_is_shown(captions):
    held_out = {m["prompt"] for split in world.SPLITS[1:] for group in world.catalogue(split).values() for m in group}
    assert len(held_out) > 1000

    def grammatical(words: list[str]) -> str:
        for i, word in enumerate(words[:-1]):
            if word in ("a", "an"):
                words[i] = "an" if words[i + 1][0] in "aeiou" else "a"
        return " ".join(words)

    for metadata, _, _, caption in captions:
        if caption == metadata["prompt"]:
            continue
        head, on, ground = caption.partition(" on a ")
        colorless = grammatical([w for w in head.split() if w not in world.COLORS])
        unrelated = head
        for relation in world.RELATIONS:
            unrelated = unrelated.replace(f" {relation} ", " and ")
        for form in (head, colorless, unrelated):
            for words in (form, " and ".join(reversed(form.split(" and ")))):
                assert words + on + ground not in held_out, (metadata["prompt"], caption)


def test_half_of_the_samples_have_them():
    recipe = Recipe((("square-shapes", 1.0),), 64, 3)
    samples = [recipe.make(i) for i in range(200)]
    prompts = sum(s.meta["caption"] == s.meta["geneval"]["prompt"] for s in samples) / len(samples)
    assert FULL_CAPTIONS == 0.5 and 0.45 < prompts < 0.8
