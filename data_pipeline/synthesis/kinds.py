"""The kinds of synthetic pictures by name, and sample number `index` of a data set as a function of its settings."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.sample import RawSample
from data_pipeline.synthesis import photos, pure, shapes_world
from data_pipeline.synthesis.corpus import Corpus, read_corpus
from data_pipeline.synthesis.fonts import Face, find_faces
from data_pipeline.synthesis.picture import Picture, draw_size, generator, to_sample


@dataclass(frozen=True)
class Sources:
    """Where text comes from; the rest is found when a kind needs it."""

    corpus: Path | None = None

    def read_corpus(self) -> Corpus:
        """The passages."""
        return _corpus(self.corpus)


@functools.cache
def _corpus(path: Path | None) -> Corpus:
    return read_corpus(path)


@functools.cache
def _faces() -> tuple[Face, ...]:
    return find_faces()


@functools.cache
def _views() -> tuple[photos.View, ...]:
    return photos.read_views()


def _text(rng: np.random.Generator, side: int, sources: Sources) -> Picture:
    return pure.make(rng, draw_size(rng, side), sources.read_corpus(), _faces())


def _shapes(rng: np.random.Generator, side: int, sources: Sources) -> Picture:
    size = draw_size(rng, side, lambda h, w: max(h, w) <= 3 * min(h, w) and min(h, w) >= 32)
    metadata = shapes_world.sample_prompt(rng, "train")
    return Picture(shapes_world.render(metadata, rng, size), metadata["prompt"], record={"geneval": metadata})


def _photo(rng: np.random.Generator, side: int, sources: Sources) -> Picture:
    return photos.make(rng, side, _views())


KINDS: dict[str, Callable[[np.random.Generator, int, Sources], Picture]] = {
    "text": _text,
    "shapes": _shapes,
    "photo": _photo,
}
JPEG_QUALITY = {"photo": 92}
"""Kinds stored as JPEG; the others are PNG."""


@dataclass(frozen=True)
class Recipe:
    """What a synthetic data set is a function of (with the fonts and photographs that are installed)."""

    weights: dict[str, float]
    """kind -> its share."""
    size: int
    """Side, in pixels, of the square whose area pictures have; a multiple of 16."""
    seed: int
    sources: Sources

    def kind(self, index: int) -> str:
        """The kind of sample `index`: shares hold closely for every run of indices (golden ratio sequence)."""
        u = (index + 0.5) * 0.6180339887498949 % 1.0
        edges = np.cumsum(list(self.weights.values()))
        return list(self.weights)[min(int(np.searchsorted(edges / edges[-1], u, "right")), len(edges) - 1)]

    def make(self, index: int) -> RawSample:
        """Sample `index`, the same bytes each time."""
        kind = self.kind(index)
        rng = generator(self.seed, index, kind)
        picture = KINDS[kind](rng, self.size, self.sources)
        return to_sample(picture, f"{kind}-{self.seed}-{index:08d}", kind, JPEG_QUALITY.get(kind))


def parse_kinds(text: str) -> dict[str, float]:
    """Shares from 'text:2,shapes,photo:0.5'. ValueError for an unknown kind or a share that isn't positive."""
    weights = {}
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
    return weights
