"""A synthetic picture with its record."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from data_pipeline.buckets import buckets
from data_pipeline.sample import RawSample
from data_pipeline.synthesis.typesetting import Line


@dataclass(frozen=True)
class Picture:
    """What a kind makes of (seed, index)."""

    image: np.ndarray
    """uint8 [h, w, 3] RGB."""
    caption: str
    lines: tuple[Line, ...] = ()
    record: dict = field(default_factory=dict)
    """Further entries of the sample's record."""
    before: np.ndarray | None = None
    """uint8 [h, w, 3]: the picture before an edit whose result `image` is."""
    mask: np.ndarray | None = None
    """uint8 [h, w]: 255 where an edit changes the picture."""


def generator(seed: int, index: int, purpose: str = "") -> np.random.Generator:
    """Random numbers as a function of the arguments only."""
    digest = hashlib.blake2b(f"{seed}/{index}/{purpose}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def draw_size(
    rng: np.random.Generator, side: int, fits: Callable[[int, int], bool] = lambda h, w: True
) -> tuple[int, int]:
    """(h, w) of one of the nine buckets at the area of a square of `side` pixels, uniformly from those that `fits`.

    Raises ValueError if none does.
    """
    sizes = [(h, w) for w, h in buckets(side) if fits(h, w)]
    if not sizes:
        raise ValueError(f"no aspect ratio at {side} px suits this kind of picture")
    return sizes[rng.integers(len(sizes))]


def to_sample(picture: Picture, key: str, source: str, jpeg_quality: int | None = None) -> RawSample:
    """The picture as a raw sample: PNG, or JPEG of the given quality."""
    image = _encode(picture.image, jpeg_quality)
    height, width = picture.image.shape[:2]
    meta = {"caption": picture.caption, "source": source, "width": width, "height": height, **picture.record}
    if picture.lines:
        meta["lines"] = [{"text": line.text, "box": list(line.box)} for line in picture.lines]
    references = [] if picture.before is None else [_encode(picture.before)]
    mask = None if picture.mask is None else _encode(picture.mask)
    return RawSample(key, image, "png" if jpeg_quality is None else "jpg", meta, references, mask)


def _encode(image: np.ndarray, jpeg_quality: int | None = None) -> bytes:
    buffer = io.BytesIO()
    if jpeg_quality is None:
        Image.fromarray(image).save(buffer, "PNG", compress_level=4)
    else:
        Image.fromarray(image).save(buffer, "JPEG", quality=jpeg_quality, subsampling=0)
    return buffer.getvalue()
