"""The best constant picture: the score of drawing the same thing whatever is asked.

constant_search.py finds it for each split of the shapes world and each rule, over pictures of up to nine shapes at
3 x 3 places on white; it is drawn and judged as any picture is. It is chosen on the very prompts that it is then scored
on: a model that looks at its prompts has to beat it.
"""

import numpy as np

from data_pipeline.synthesis.shapes_world import BACKGROUNDS, COLORS, Placed, draw

PLACES = 9
RADIUS = 0.115
"""Of a shape, as a share of the shorter side: small enough that nine stand apart."""
RULES = ("strict", "official")
BEST: dict[tuple[str, str], str] = {
    ("validation", "strict"):
        "-, -, purple triangle, -, -, "
        "-, pink square, -, -",
    ("validation", "official"):
        "pink triangle, purple triangle, red triangle, blue star, red square, "
        "yellow square, orange circle, yellow star, red circle",
    ("test-iid", "strict"):
        "-, blue square, -, -, -, "
        "-, -, -, -",
    ("test-iid", "official"):
        "purple circle, brown triangle, purple star, brown square, blue circle, "
        "brown square, blue triangle, green square, purple circle",
    ("test-compositional", "strict"):
        "pink circle, -, -, -, -, "
        "-, -, -, -",
    ("test-compositional", "official"):
        "green circle, yellow triangle, purple triangle, orange star, blue triangle, "
        "brown triangle, blue star, green star, purple star",
}  # fmt: skip
"""(split, rule) -> what stands at each place, row by row."""


def placed(cells: tuple[str, ...], size: tuple[int, int]) -> list[Placed]:
    """ "COLOUR SHAPE" at each of the nine places of a picture of `size` (h, w), or nothing where "-" is."""
    side = min(size)
    top, left = (size[0] - side) / 2, (size[1] - side) / 2
    found = []
    for i, (color, shape) in ((i, cell.split()) for i, cell in enumerate(cells) if cell != "-"):
        x, y = left + side * (i % 3 + 0.5) / 3, top + side * (i // 3 + 0.5) / 3
        found.append(Placed(shape, color, COLORS[color], x, y, RADIUS * side, 0.0))
    return found


def best_constant(split: str, rule: str, size: tuple[int, int]) -> np.ndarray:
    """The picture, uint8 of `size` (h, w), that was found best for a split by the strict or the official rule."""
    return draw(placed(tuple(BEST[split, rule].split(", ")), size), BACKGROUNDS["white"], size)
