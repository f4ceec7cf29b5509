"""The shapes world: prompts with GenEval metadata, and true pictures of them.

Prompts are those of GenEval's six tags (arXiv 2310.11513) over four shapes and eight of GenEval's colours, each on one
of nine named plain backgrounds or on an unnamed one:

    {"tag": "position", "prompt": "a star above a circle on a pale blue background", "background": "pale blue",
     "include": [{"class": "circle", "count": 1}, {"class": "star", "count": 1, "position": ["above", 0]}]}

Which split a prompt belongs to is a hash of its canonical metadata, so prompts that mean the same (a star and a circle,
a circle and a star) never fall into different splits. Prompts with a held-out pair of colour and shape, or with the
held-out count, are the split test-compositional; no picture of any prompt without named colours shows such a pair.
"""

import functools
import hashlib
import json
import math
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, Literal

import cv2
import numpy as np

Metadata = dict[str, Any]
Split = Literal["train", "validation", "test-iid", "test-compositional"]

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SPLITS: tuple[Split, ...] = ("train", "validation", "test-iid", "test-compositional")
SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (222, 32, 38),
    "orange": (250, 140, 20),
    "yellow": (246, 216, 36),
    "green": (34, 158, 62),
    "blue": (32, 78, 220),
    "purple": (126, 44, 172),
    "pink": (250, 124, 182),
    "brown": (124, 72, 34),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (14, 14, 16),
    "gray": (150, 152, 154),
    "navy": (20, 26, 58),
    "beige": (238, 226, 204),
    "pale blue": (206, 224, 240),
    "pale green": (212, 236, 214),
    "pale pink": (248, 224, 230),
    "pale yellow": (250, 246, 214),
}
COUNTS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")

HELD_OUT_PAIRS = frozenset(
    {
        ("green", "circle"),
        ("pink", "circle"),
        ("purple", "square"),
        ("blue", "triangle"),
        ("yellow", "triangle"),
        ("orange", "star"),
    }
)
HELD_OUT_COUNT = 4
VALIDATION_SHARE, TEST_SHARE = 0.10, 0.25

_OPPOSITE = {"right of": "left of", "below": "above"}
_EXTENT = {"circle": 1.0, "square": 1.2, "triangle": 1.3, "star": 1.3}
"""Circumradius of a shape of radius 1, chosen to make the four look equally large."""
_SUPERSAMPLING = 4


def _clause(shape: str, count: int = 1, **more: Any) -> Metadata:
    return {"class": shape, "count": count, **more}


def _noun(clause: Metadata) -> str:
    name = f"{clause['color']} {clause['class']}" if "color" in clause else clause["class"]
    if clause["count"] > 1:
        return f"{COUNTS[clause['count']]} {name}s"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def prompt_of(metadata: Metadata) -> str:
    """The sentence for metadata; one metadata has one sentence."""
    include = metadata["include"]
    if metadata["tag"] == "position":
        text = f"{_noun(include[1])} {include[1]['position'][0]} {_noun(include[0])}"
    else:
        text = " and ".join(_noun(c) for c in include)
    return text if metadata["background"] is None else f"{text} on a {metadata['background']} background"


def canonical(metadata: Metadata) -> str:
    """A string that two metadata share exactly if they describe the same pictures (the prompt's words aside)."""
    include = [{k: v for k, v in c.items() if k != "position"} for c in metadata["include"]]
    relation = None
    if metadata["tag"] == "position":
        relation = metadata["include"][1]["position"][0]
        if relation in _OPPOSITE:
            relation, include = _OPPOSITE[relation], include[::-1]
    else:
        include = sorted(include, key=lambda c: (c["class"], c.get("color", "")))
    return json.dumps([metadata["tag"], include, relation, metadata["background"]], sort_keys=True)


def split_of(metadata: Metadata) -> Split:
    """The split that metadata belongs to, a function of `canonical(metadata)` only."""
    include = metadata["include"]
    if any((c.get("color"), c["class"]) in HELD_OUT_PAIRS or c["count"] == HELD_OUT_COUNT for c in include):
        return "test-compositional"
    digest = hashlib.sha256(canonical(metadata).encode()).digest()
    u = int.from_bytes(digest[:8], "big") / 2**64
    if u < TEST_SHARE:
        return "test-iid"
    return "validation" if u < TEST_SHARE + VALIDATION_SHARE else "train"


def _includes(tag: str) -> list[list[Metadata]]:
    pairs = list(permutations(SHAPES, 2))
    if tag == "single_object":
        return [[_clause(s)] for s in SHAPES]
    if tag == "two_object":
        return [[_clause(a), _clause(b)] for a, b in pairs]
    if tag == "counting":
        return [[_clause(s, n)] for s, n in product(SHAPES, COUNTS)]
    if tag == "colors":
        return [[_clause(s, color=c)] for s, c in product(SHAPES, COLORS)]
    if tag == "position":
        return [[_clause(b), _clause(a, position=[r, 0])] for (a, b), r in product(pairs, RELATIONS)]
    colors = permutations(COLORS, 2)
    return [[_clause(a, color=c), _clause(b, color=d)] for (a, b), (c, d) in product(pairs, colors)]


@functools.cache
def catalogue(split: Split) -> dict[str, list[Metadata]]:
    """Every metadata of a split by tag, in a fixed order; tags without any are left out. Do not modify the result.

    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known are {', '.join(SPLITS)}")
    found: dict[str, list[Metadata]] = {}
    for tag in TAGS:
        for include, background in product(_includes(tag), (None, *BACKGROUNDS)):
            metadata = {"tag": tag, "include": include, "background": background}
            if tag == "counting":
                metadata["exclude"] = [_clause(include[0]["class"], include[0]["count"] + 1)]
            if split_of(metadata) == split:
                found.setdefault(tag, []).append({**metadata, "prompt": prompt_of(metadata)})
    return found


def sample_prompt(rng: np.random.Generator, split: Split, tag: str | None = None) -> Metadata:
    """Draw a tag uniformly (or take `tag`), then one of its prompts in `split` uniformly.

    Raises ValueError for an unknown split, or a tag that the split doesn't have.
    """
    choices = catalogue(split)
    if tag is None:
        tag = list(choices)[rng.integers(len(choices))]
    if tag not in choices:
        raise ValueError(f"split {split} has no prompts with tag {tag!r}; it has {', '.join(choices)}")
    return json.loads(json.dumps(choices[tag][rng.integers(len(choices[tag]))]))


@dataclass(frozen=True)
class Placed:
    """A shape at its place: centre (x, y) and radius in pixels, rotation in radians, colour in RGB."""

    shape: str
    color: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    radius: float
    rotation: float

    def outline(self) -> np.ndarray:
        """Corners as float64 [N, 2] (x, y); a circle has 64."""
        n, start = {
            "circle": (64, 0.0),
            "square": (4, math.pi / 4),
            "triangle": (3, -math.pi / 2),
            "star": (10, -math.pi / 2),
        }[self.shape]
        angle = self.rotation + start + np.arange(n) * (2 * math.pi / n)
        r = np.full(n, self.radius * _EXTENT[self.shape])
        if self.shape == "star":
            r[1::2] *= 0.45
        return np.stack([self.x + r * np.cos(angle), self.y + r * np.sin(angle)], 1)


def _jitter(rng: np.random.Generator, rgb: tuple[int, int, int], amount: int) -> tuple[int, int, int]:
    return tuple(int(v) for v in np.clip(np.array(rgb) + rng.integers(-amount, amount + 1, 3), 0, 255))


def _color(rng: np.random.Generator, clause: Metadata) -> str:
    if "color" in clause:
        return clause["color"]
    allowed = [c for c in COLORS if (c, clause["class"]) not in HELD_OUT_PAIRS]
    return allowed[rng.integers(len(allowed))]


def relation_holds(a: Placed, b: Placed, relation: str) -> bool:
    """Whether a is clearly "left of" (or so) b."""
    dx, dy = a.x - b.x, a.y - b.y
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along > 2 * abs(across) and along > 1.2 * (a.radius + b.radius)


def _place(
    clause: Metadata,
    color: str,
    others: list[Placed],
    target: Placed | None,
    rng: np.random.Generator,
    size: tuple[int, int],
) -> Placed | None:
    """A shape apart from `others` and the border and in its relation to `target`; None after 100 attempts."""
    height, width = size
    side = min(size)
    few = clause["count"] + len(others) <= 2
    shape, extent = clause["class"], _EXTENT[clause["class"]]
    for _ in range(100):
        radius = side * rng.uniform(*((0.14, 0.21) if few else (0.12, 0.155)))
        reach = radius * extent + 0.02 * side
        x, y = rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)
        item = Placed(shape, color, _jitter(rng, COLORS[color], 8), x, y, radius, rng.uniform(-0.25, 0.25))
        apart = all(
            math.hypot(x - o.x, y - o.y) > radius * extent + o.radius * _EXTENT[o.shape] + 0.05 * side for o in others
        )
        if apart and (target is None or relation_holds(item, target, clause["position"][0])):
            return item
    return None


def _try_layout(metadata: Metadata, rng: np.random.Generator, size: tuple[int, int]) -> list[Placed] | None:
    placed: list[Placed] = []
    first_of_clause: list[Placed] = []
    for clause in metadata["include"]:
        color = _color(rng, clause)
        target = first_of_clause[clause["position"][1]] if "position" in clause else None
        group = []
        for _ in range(clause["count"]):
            item = _place(clause, color, placed + group, target, rng, size)
            if item is None:
                return None
            group.append(item)
        first_of_clause.append(group[0])
        placed += group
    return placed


def layout(metadata: Metadata, rng: np.random.Generator, size: tuple[int, int]) -> list[Placed]:
    """Places for exactly the objects of `metadata` in a picture of `size` (h, w), none touching another or the border.

    Raises ValueError if they don't fit.
    """
    for _ in range(200):
        if (placed := _try_layout(metadata, rng, size)) is not None:
            return placed
    raise ValueError(f"{metadata['prompt']!r} doesn't fit into {size[0]}x{size[1]} pixels")


def draw(objects: list[Placed], background: tuple[int, int, int], size: tuple[int, int]) -> np.ndarray:
    """Paint objects, first to last, on a plain background: uint8 [h, w, 3], anti-aliased by 4x4 supersampling."""
    height, width = size
    canvas = np.empty((height * _SUPERSAMPLING, width * _SUPERSAMPLING, 3), np.uint8)
    canvas[:] = background
    for item in objects:
        corners = np.round(item.outline() * _SUPERSAMPLING - 0.5).astype(np.int32)
        cv2.fillPoly(canvas, [corners], item.rgb)
    return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)


def arrange(
    metadata: Metadata, rng: np.random.Generator, size: tuple[int, int]
) -> tuple[list[Placed], str, tuple[int, int, int]]:
    """Shapes for a true picture of `metadata` of `size` (h, w) pixels, the background's name and its colour.

    Raises ValueError for sides under 32 px or ratios beyond 3:1.
    """
    if min(size) < 32 or max(size) > 3 * min(size):
        raise ValueError(f"shapes need sides of at least 32 px and a ratio of at most 3:1, got {size[0]}x{size[1]}")
    name = metadata.get("background") or list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    background = _jitter(rng, BACKGROUNDS[name], 5)
    return layout(metadata, rng, size), name, background


def render(metadata: Metadata, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A true picture of `metadata`, uint8 [h, w, 3] RGB; see `arrange`."""
    placed, _, background = arrange(metadata, rng, size)
    return draw(placed, background, size)
