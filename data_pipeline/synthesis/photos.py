"""Crops of the photographs that come with installed packages, with captions written by hand (`photos.toml`)."""

import functools
import importlib.util
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.synthesis.picture import Picture, draw_size

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
    within: tuple[int, int, int, int] | None
    """Box that a crop must stay in; None for the whole photograph."""


def read_views(names: tuple[str, ...] | None = None) -> tuple[View, ...]:
    """The views of `photos.toml` whose photographs are installed and, if `names` are given, among these file names.

    Raises ValueError if there is none.
    """
    views = []
    for entry in tomllib.loads(VIEWS.read_text(encoding="utf-8"))["view"]:
        photograph = installed_file(entry["package"], entry["file"])
        if photograph is not None and (names is None or photograph.name in names):
            boxes = (tuple(entry[name]) if name in entry else None for name in ("subject", "within"))
            views.append(View(photograph, tuple(entry["captions"]), *boxes))
    if not views:
        of = "" if names is None else f" called {', '.join(names)}"
        raise ValueError(f"no photographs{of} found in scikit-image, scikit-learn or matplotlib")
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


def make(rng: np.random.Generator, side: int, views: tuple[View, ...]) -> Picture:
    """A crop of a random photograph, at the area of a square of `side` pixels in a ratio that it has room for."""
    photographs = sorted({view.path for view in views}, key=lambda path: path.name)
    path = photographs[rng.integers(len(photographs))]
    of_photograph = [view for view in views if view.path == path]
    view = of_photograph[rng.integers(len(of_photograph))]
    photo = load_photo(path)
    height, width = draw_size(rng, side, lambda h, w: draw_crop(rng, photo.size, view, w / h) is not None)
    box = draw_crop(rng, photo.size, view, width / height)
    image = np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS, box=box))
    return Picture(image, view.captions[rng.integers(len(view.captions))], record={"photo": path.name})


def draw_crop(
    rng: np.random.Generator, size: tuple[int, int], view: View, ratio: float
) -> tuple[float, float, float, float] | None:
    """A box of width / height = `ratio` in a photograph of `size` (w, h) that shows the view; None if none does."""
    x0, y0, x1, y1 = view.within or (0, 0, *size)
    largest = min(x1 - x0, (y1 - y0) * ratio)
    if view.subject is None:
        left = right = rng.uniform(x0, x1)
        top = bottom = rng.uniform(y0, y1)
        smallest = largest * LEAST_SHARE
    else:
        left, top, right, bottom = view.subject
        smallest = max(right - left, (bottom - top) * ratio)
    if smallest > largest:
        return None
    w = rng.uniform(smallest, largest)
    h = w / ratio
    x = rng.uniform(max(x0, right - w), min(left, x1 - w))
    y = rng.uniform(max(y0, bottom - h), min(top, y1 - h))
    return x, y, x + w, y + h
