"""Pictures of the shapes world in which a shape can stand in four places only: quick to learn, and of the same prompts.

Where shapes stand, how large and how tilted they are is most of what a model has to learn of the shapes world; prompts
ask for none of it, relations aside.
"""

from dataclasses import replace

import numpy as np

from data_pipeline.synthesis import shapes_world as world

RADIUS = 0.17
"""Of every shape, in sides of the picture: a star, the widest, keeps .03 from the edges of its quarter."""


def neatly(
    metadata: world.Metadata, rng: np.random.Generator, size: tuple[int, int]
) -> tuple[list[world.Placed], str, tuple[int, int, int]]:
    """`shapes_world.arrange` with upright shapes of one size in the quarters of a picture of `size` (h, w), in colours
    that don't vary. At most four objects."""
    placed, background, _ = world.arrange(metadata, rng, size)
    while True:
        quarters = rng.permutation(4)[: len(placed)]
        moved = [_in_quarter(item, int(quarter), size) for item, quarter in zip(placed, quarters, strict=True)]
        if _as_asked(metadata, moved):
            return moved, background, world.BACKGROUNDS[background]


def _in_quarter(item: world.Placed, quarter: int, size: tuple[int, int]) -> world.Placed:
    row, column = divmod(quarter, 2)
    height, width = size
    x, y = width * (0.25 + 0.5 * column), height * (0.25 + 0.5 * row)
    return replace(item, rgb=world.COLORS[item.color], x=x, y=y, radius=RADIUS * min(size), rotation=0.0)


def _as_asked(metadata: world.Metadata, placed: list[world.Placed]) -> bool:
    """Whether relations hold between the objects, which are in the order of the prompt's clauses, one a clause."""
    clauses = metadata["include"]
    return all(
        world.relation_holds(placed[i], placed[clause["position"][1]], clause["position"][0])
        for i, clause in enumerate(clauses)
        if "position" in clause
    )
