"""The kinds of synthetic pictures by name, and sample number `index` of a data set as a function of its settings."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.sample import RawSample
from data_pipeline.synthesis import edits, layouts, photos, pure, scenes, shapes_world
from data_pipeline.synthesis.corpus import read_corpus
from data_pipeline.synthesis.fonts import file_hashes, find_faces
from data_pipeline.synthesis.full_captions import full_caption
from data_pipeline.synthesis.neat_shapes import neatly
from data_pipeline.synthesis.picture import Picture, draw_size, generator, to_sample
from data_pipeline.synthesis.rare_characters import passages_showing_all, spread
from data_pipeline.synthesis.templates import read_templates, template_files

FULL_CAPTIONS = 0.5
"""Share of shapes pictures whose caption says all, and not just what their prompt asks for."""


@dataclass(frozen=True)
class Sources:
    """What a user may replace; None stands for what is embedded."""

    corpus: Path | None = None
    templates: Path | None = None
    photos: tuple[str, ...] | None = None
    """File names of the embedded photographs to draw from; all others are held out."""


_corpus = functools.cache(read_corpus)
_templates = functools.cache(read_templates)
_faces = functools.cache(find_faces)
_views = functools.cache(photos.read_views)
_places = functools.cache(scenes.read_places)


def _text(rng: np.random.Generator, side: int, sources: Sources, passage: str | None) -> Picture:
    return pure.make(rng, side, _corpus(sources.corpus), _faces(), passage)


def _shapes(rng: np.random.Generator, side: int, sources: Sources, passage: None) -> Picture:
    return _draw_shapes(rng, draw_size(rng, side, lambda h, w: max(h, w) <= 3 * min(h, w) and min(h, w) >= 32))


def _square_shapes(rng: np.random.Generator, side: int, sources: Sources, passage: None) -> Picture:
    """For very small models: at 64 pixels the other aspect ratios leave a shape about one token."""
    return _draw_shapes(rng, (side, side))


def _neat_shapes(rng: np.random.Generator, side: int, sources: Sources, passage: None) -> Picture:
    """For minutes of training: upright shapes of one size in the quarters of a square, in pure colours."""
    return _draw_shapes(rng, (side, side), neatly)


def _draw_shapes(rng: np.random.Generator, size: tuple[int, int], arrange: Callable = shapes_world.arrange) -> Picture:
    metadata = shapes_world.sample_prompt(rng, "train")
    placed, name, background = arrange(metadata, rng, size)
    caption = full_caption(metadata, placed, name, rng) if rng.random() < FULL_CAPTIONS else metadata["prompt"]
    return Picture(shapes_world.draw(placed, background, size), caption, record={"geneval": metadata})


def _photo(rng: np.random.Generator, side: int, sources: Sources, passage: None) -> Picture:
    return photos.make(rng, side, _views(sources.photos))


def _layout(rng: np.random.Generator, side: int, sources: Sources, passage: None) -> Picture:
    return layouts.make(
        rng, side, _templates(sources.templates), _corpus(sources.corpus), _faces(), _views(sources.photos)
    )


def _scene(rng: np.random.Generator, side: int, sources: Sources, passage: None) -> Picture:
    return scenes.make(rng, side, _places(sources.photos), _corpus(sources.corpus), _faces())


def _edit(rng: np.random.Generator, side: int, sources: Sources, passage: None) -> Picture:
    return edits.make(rng, side, _corpus(sources.corpus), _faces(), _places(sources.photos))


KINDS: dict[str, Callable[[np.random.Generator, int, Sources, str | None], Picture]] = {
    "text": _text,
    "shapes": _shapes,
    "photo": _photo,
    "scene": _scene,
    "layout": _layout,
    "edit": _edit,
    "square-shapes": _square_shapes,
    "neat-shapes": _neat_shapes,
}
"""Each takes random numbers, the side in pixels, the sources and, for text, a passage that must be shown."""
WITH_TEXT = {"text", "scene", "layout", "edit"}
"""Kinds that need fonts."""
JPEG_QUALITY = {"photo": 92, "scene": 92}
"""Kinds stored as JPEG; the others are PNG."""


@dataclass(frozen=True)
class Recipe:
    """What a synthetic data set is a function of (with the fonts and photographs that are installed)."""

    weights: tuple[tuple[str, float], ...]
    """(kind, share)."""
    size: int
    """Side, in pixels, of the square whose area pictures have; a multiple of 16."""
    seed: int
    sources: Sources = Sources()

    def kind(self, index: int) -> str:
        """The kind of sample `index`: shares hold closely for every run of indices (golden ratio sequence)."""
        u = (index + 0.5) * 0.6180339887498949 % 1.0
        edges = np.cumsum([share for _, share in self.weights])
        return self.weights[int(np.searchsorted(edges[:-1] / edges[-1], u, "right"))][0]

    def load(self) -> None:
        """Read what the kinds need, so that bad input is found at once and processes that fork share it."""
        kinds = {kind for kind, _ in self.weights}
        if kinds & WITH_TEXT:
            _corpus(self.sources.corpus), _faces()
        if kinds & {"photo", "layout"}:
            _views(self.sources.photos)
        if kinds & {"scene", "edit"}:
            _places(self.sources.photos)
        if "layout" in kinds:
            _templates(self.sources.templates)

    def sources_read(self) -> dict[str, dict[str, str]]:
        """What the pictures may show, by its contents: fonts, corpus, templates, photographs, each name -> hash."""
        kinds, sources = {kind for kind, _ in self.weights}, self.sources
        views = _views(sources.photos) if kinds & {"photo", "layout"} else ()
        views += tuple(p.view for p in _places(sources.photos)) if kinds & {"scene", "edit"} else ()
        return {
            "fonts": file_hashes({f.name: f.path for f in _faces()} if kinds & WITH_TEXT else {}),
            "texts": {"corpus": _corpus(sources.corpus).digest()} if kinds & WITH_TEXT else {},
            "layouts": file_hashes(template_files(sources.templates) if "layout" in kinds else {}),
            "photographs": file_hashes({view.path.name: view.path for view in views}),
        }

    def passages(self, count: int, at_least: int) -> dict[int, str]:
        """Passages for text samples of the first `count` that make every drawable character appear `at_least` times.

        Raises ValueError if there are too few text samples for that.
        """
        slots = [i for i in range(count) if self.kind(i) == "text"]
        can_show = functools.partial(pure.can_show, side=self.size, faces=_faces())
        shown = passages_showing_all(_corpus(self.sources.corpus), at_least, can_show)
        generator(self.seed, 0, "passages").shuffle(shown)
        return spread(shown, slots)

    def make(self, index: int, passage: str | None = None) -> RawSample:
        """Sample `index`, the same bytes each time; a text sample shows `passage`, if one is given."""
        kind = self.kind(index)
        rng = generator(self.seed, index, kind)
        picture = KINDS[kind](rng, self.size, self.sources, passage)
        return to_sample(picture, f"{kind}-{self.seed}-{index:08d}", kind, JPEG_QUALITY.get(kind))


def make_job(recipe: Recipe, job: tuple[int, str | None]) -> RawSample:
    """`recipe.make` of a job (index, passage), for worker processes."""
    return recipe.make(*job)


def parse_kinds(text: str) -> tuple[tuple[str, float], ...]:
    """Shares from 'text:2,shapes,photo:0.5'. ValueError for an unknown kind or a share that isn't positive."""
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, _, share = item.strip().partition(":")
        if name not in KINDS:
            raise ValueError(f"unknown kind {name!r}; known are {', '.join(KINDS)}")
        try:
            weights[name] = float(share or 1)
        except ValueError:
            raise ValueError(f"the share of {name} must be a number, not {share!r}") from None
        if not 0 < weights[name] < float("inf"):
            raise ValueError(f"the share of {name} must be positive, not {share}")
    return tuple(weights.items())
