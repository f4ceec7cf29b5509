"""Aspect-ratio buckets: the picture sizes that a resolution trains on (Qwen-Image report, section 3.2, stage 1)."""

import math
from functools import cache

RATIOS = ((1, 1), (2, 3), (3, 2), (3, 4), (4, 3), (9, 16), (16, 9), (1, 3), (3, 1))
"""Width to height."""

MULTIPLE = 16
"""Sides are multiples of this many pixels: 8 of the VAE times the patch of 2."""

Box = tuple[float, float, float, float]
"""left, top, right, bottom in pixels of the picture as it came."""


@cache
def buckets(res: int) -> tuple[tuple[int, int], ...]:
    """(width, height) of each ratio at an area of about res² pixels, in the order of `RATIOS`.

    ValueError if `res` is no positive multiple of 16.
    """
    if res < MULTIPLE or res % MULTIPLE:
        raise ValueError(f"a resolution must be a positive multiple of {MULTIPLE}, not {res}")
    sides = lambda ratio: max(MULTIPLE, round(res * math.sqrt(ratio) / MULTIPLE) * MULTIPLE)  # noqa: E731
    return tuple((sides(w / h), sides(h / w)) for w, h in RATIOS)


def choose_bucket(width: int, height: int, res: int) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest, by the ratio of ratios; the earlier one if two are as near."""
    ratio = math.log(width / height)
    return min(buckets(res), key=lambda size: abs(math.log(size[0] / size[1]) - ratio))


def centre_crop(width: int, height: int, bucket: tuple[int, int]) -> Box:
    """The largest centred box of a width x height picture that has the bucket's aspect ratio."""
    w, h = bucket
    scale = min(width / w, height / h)
    left, top = max(0.0, (width - w * scale) / 2), max(0.0, (height - h * scale) / 2)  # rounding may go below 0
    return left, top, width - left, height - top
