"""Captions that say all of a picture of the shapes world, as a describing model's do: colours, background, relation.

What a prompt leaves open a picture must have anyway; a model can't know it, and learns less from it. Nothing is said
that would show a held-out prompt: neither the caption nor what is left of it without colours or without the relation.
"""

from typing import Any

import numpy as np

from data_pipeline.synthesis import shapes_world as world

PAIRS = ("two_object", "position", "color_attr")
"""Tags of prompts with two objects."""


def full_caption(
    metadata: dict[str, Any], placed: list[world.Placed], background: str, rng: np.random.Generator
) -> str:
    """The most that may be said of a picture of a training prompt, arranged by `shapes_world.arrange`.

    One object more to the right or left is named first at random. The prompt itself if nothing more may be said.
    """
    first, last = placed[0], placed[-1]
    if metadata["tag"] in PAIRS:
        a, b = (first, last) if rng.integers(2) else (last, first)
        holding = [r for r in world.RELATIONS if world.relation_holds(a, b, r)]
        nouns = [{"class": o.shape, "count": 1, "color": o.color} for o in (b, a)]
        for named in (background, None):
            for relation in (*holding, None):
                if _allowed(nouns, relation, named):
                    return _sentence(nouns, relation, named)
        return metadata["prompt"]
    noun = {"class": first.shape, "count": len(placed), "color": first.color}
    for named in (background, None):
        if _allowed([noun], None, named):
            return _sentence([noun], None, named)
    return metadata["prompt"]


def _allowed(nouns: list[dict[str, Any]], relation: str | None, background: str | None) -> bool:
    """Whether neither the caption nor its form without colours or without relation is a held-out prompt."""
    bare = [{k: v for k, v in n.items() if k != "color"} for n in nouns]
    if len(nouns) == 1:
        counted = nouns[0]["count"] > 1
        forms = [("counting" if counted else "single_object", bare)] + ([] if counted else [("colors", nouns)])
    elif relation is None:
        forms = [("two_object", bare), ("color_attr", nouns)]
    else:
        forms = [("position", [bare[0], bare[1] | {"position": [relation, 0]}]), ("color_attr", nouns)]
    return all(
        world.split_of({"tag": tag, "include": include, "background": background}) == "train" for tag, include in forms
    )


def _sentence(nouns: list[dict[str, Any]], relation: str | None, background: str | None) -> str:
    if relation is not None:
        nouns = [nouns[0], nouns[1] | {"position": [relation, 0]}]
    return world.prompt_of(
        {"tag": "position" if relation else "two_object", "include": nouns, "background": background}
    )
