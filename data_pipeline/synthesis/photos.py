"""Crops of the photographs that come with installed packages, with captions written by hand (`photos.toml`)."""

import functools
import importlib.util
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.synthesis.picture import Picture

VIEWS = Path(__file__).with_name("photos.toml")
LEAST_SHARE = 0.35
"""Least width of a crop of a view without subject, as a share of the largest crop."""


@dataclass(frozen=True)
class View:
    """A part of a photograph that captions describe."""

    path: Path
    captions: tuple[str, ...]
    subject: tuple[int, int, int, int] | None
    """Box that a crop must contain; None if any crop will do."""


def read_views() -> tuple[View, ...]:
    """The views of `photos.toml` whose photographs are installed. Raises ValueError if there is none."""
    views = []
    for entry in tomllib.loads(VIEWS.read_text(encoding="utf-8"))["view"]:
        photograph = installed_file(entry["package"], entry["file"])
        if photograph is not None:
            subject = tuple(entry["subject"]) if "subject" in entry else None
            views.append(View(photograph, tuple(entry["captions"]), subject))
    if not views:
        raise ValueError("no photographs found: install scikit-image, scikit-learn or matplotlib")
    return tuple(views)


def installed_file(package: str, file: str) -> Path | None:
    """A file that an installed package ships; None if there is no such package or file. Imports nothing."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.submodule_search_locations[0]) / file if spec and spec.submodule_search_locations else None
    return path if path is not None and path.is_file() else None


@functools.cache
def load_photo(path: Path) -> Image.Image:
    """The photograph as RGB; do not modify it."""
    with Image.open(path) as image:
        return image.convert("RGB")


def make(rng: np.random.Generator, size: tuple[int, int], views: tuple[View, ...]) -> Picture:
    """A random crop of one of the views that `size` (h, w) has room for, resized to it.

    Raises ValueError if no view fits the ratio.
    """
    height, width = size
    for i in rng.permutation(len(views)):
        view = views[i]
        photo = load_photo(view.path)
        box = _draw_crop(rng, photo.size, view.subject, width / height)
        if box is not None:
            image = np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS, box=box))
            caption = view.captions[rng.integers(len(view.captions))]
            return Picture(image, caption, record={"photo": view.path.name})
    raise ValueError(f"no photograph has a subject that fits {width}x{height} pixels")


def _draw_crop(rng, size: tuple[int, int], subject, ratio: float) -> tuple[float, float, float, float] | None:
    """A box of width / height = `ratio` in a photograph of `size` (w, h) that contains `subject`."""
    width, height = size
    largest = min(width, height * ratio)
    if subject is None:
        left = right = rng.uniform(0, width)
        top = bottom = rng.uniform(0, height)
        smallest = largest * LEAST_SHARE
    else:
        left, top, right, bottom = subject
        smallest = max(right - left, (bottom - top) * ratio)
    if smallest > largest:
        return None
    w = rng.uniform(smallest, largest)
    h = w / ratio
    x = rng.uniform(max(0, right - w), min(left, width - w))
    y = rng.uniform(max(0, bottom - h), min(top, height - h))
    return x, y, x + w, y + h
