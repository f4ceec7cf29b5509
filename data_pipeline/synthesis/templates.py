"""Templates of slides, posters, forms, screens and receipts, and the rules that fill them in.

A template is a TOML file; `docs/data.md` says how to write one. Its words are fields, drawn anew for each picture and
given for each language apart; its elements are placed by shares of the picture's width and height.
"""

import datetime
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.synthesis.corpus import Corpus

EMBEDDED = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Element:
    """A part of a template. Colours are names of the palette."""

    kind: str
    """rect, ellipse, text, photo or bars."""
    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 as shares of width and height."""
    text: str = ""
    """With {fields}."""
    size: float = 0.06
    """Type size as a share of the square root of the picture's area; smaller where the text needs it."""
    face: str = "body"
    """A role of `faces`."""
    align: str = "left"
    valign: str = "middle"
    leading: float = 1.35
    color: str = "ink"
    fill: str = ""
    outline: str = ""
    width: float = 0.004
    """Of an outline, as a share like `size`."""
    radius: float = 0.0
    """Of corners, as a share like `size`."""
    chance: float = 1.0
    """How often it is there. Text that captions quote must always be there."""


@dataclass(frozen=True)
class Wording:
    """What a template says in one language."""

    captions: tuple[str, ...]
    fields: dict[str, Any]


@dataclass(frozen=True)
class Template:
    """A parsed file."""

    name: str
    ratios: tuple[tuple[int, int], ...]
    """Width to height."""
    palettes: tuple[dict[str, str], ...]
    """Colour names to #rrggbb."""
    faces: dict[str, tuple[str, ...]]
    """Role -> looks that suit it ('bold serif'); any face does if none of them has the characters."""
    elements: tuple[Element, ...]
    wordings: dict[str, Wording]


def read_templates(folder: Path | None = None) -> tuple[Template, ...]:
    """The templates of a folder; the embedded ones without a folder. ValueError names the file and what is wrong."""
    return tuple(_read_template(path) for path in template_files(folder).values())


def template_files(folder: Path | None = None) -> dict[str, Path]:
    """Name -> file of each template, in the order of `read_templates`; ValueError if the folder holds none."""
    folder = folder or EMBEDDED
    paths = sorted(folder.glob("*.toml"))
    if not paths:
        raise ValueError(f"{folder} holds no .toml templates")
    return {path.stem: path for path in paths}


def _read_template(path: Path) -> Template:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        template = Template(
            path.stem,
            tuple((int(w), int(h)) for w, h in (ratio.split(":") for ratio in data.pop("ratios"))),
            tuple(data.pop("palette")),
            {role: tuple(looks) for role, looks in data.pop("faces").items()},
            tuple(Element(**{**e, "box": tuple(e["box"])}) for e in data.pop("element")),
            {lang: Wording(tuple(w["captions"]), w["fields"]) for lang, w in data.items()},
        )
        _check(template)
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: {what}") from None
    return template


def _check(template: Template) -> None:
    if not template.wordings:
        raise ValueError("no wording: add a table [english] with captions and fields")
    kinds = ("rect", "ellipse", "text", "photo", "bars")
    for number, element in enumerate(template.elements, 1):
        x0, y0, x1, y1 = element.box
        if element.kind not in kinds:
            raise ValueError(f"element {number}: unknown kind {element.kind!r}; known are {', '.join(kinds)}")
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise ValueError(f"element {number}: its box must be x0 < x1, y0 < y1, all from 0 to 1")
        if element.kind == "text" and element.face not in template.faces:
            raise ValueError(f"element {number}: no face {element.face!r} under [faces]")
        for color in (getattr(element, f.name) for f in fields(Element) if f.name in ("color", "fill", "outline")):
            if color and any(color not in palette for palette in template.palettes):
                raise ValueError(f"element {number}: a palette lacks the colour {color!r}")
    texts = [e.text for e in template.elements]
    for language, wording in template.wordings.items():
        values = {name: "" for names in wording.fields for name in names.split()}
        for text in (*texts, *wording.captions):
            try:
                text.format(**values)
            except KeyError as error:
                raise ValueError(f"[{language}] has no field {error} for {text!r}") from None


def draw_fields(rng: np.random.Generator, wording: Wording, corpus: Corpus) -> dict[str, str] | None:
    """A value for every field of the wording, by its rule; None if the corpus has no passage that a rule asks for."""
    numbers: dict[str, Decimal] = {}
    values: dict[str, str] = {}
    for names, rule in wording.fields.items():
        if isinstance(rule, list):
            chosen = rng.choice(len(rule), len(names.split()), replace=False)
            values |= {name: rule[i] for name, i in zip(names.split(), chosen, strict=True)}
            continue
        for name in names.split():
            value = _RULES[next(iter(rule))](rng, rule, corpus, numbers, name)
            if value is None:
                return None
            values[name] = value
    return values


def _draw_passage(rng, rule: dict, corpus: Corpus, numbers, name) -> str | None:
    """{corpus = "english", most = 20, least = 8}: a passage of that many em."""
    if rule["corpus"] not in corpus.passages:
        return None
    return corpus.draw(rng, rule["corpus"], rule["most"], rule.get("least", 0))


def _draw_number(rng, rule: dict, corpus, numbers: dict[str, Decimal], name: str) -> str:
    """{number = [1, 9], step = 0.5, format = "${:.2f}"}."""
    low, high = (Decimal(str(v)) for v in rule["number"])
    step = Decimal(str(rule.get("step", 1)))
    numbers[name] = low + step * int(rng.integers(int((high - low) / step) + 1))
    return rule.get("format", "{}").format(numbers[name])


def _add_up(rng, rule: dict, corpus, numbers: dict[str, Decimal], name: str) -> str:
    """{sum = ["a", "b"], format = "{:.2f}"}: of number fields above."""
    numbers[name] = sum((numbers[n] for n in rule["sum"]), Decimal(0))
    return rule.get("format", "{}").format(numbers[name])


def _draw_digits(rng, rule: dict, corpus, numbers, name) -> str:
    """{digits = "Order ##-###"}: every # becomes a digit."""
    return "".join(str(rng.integers(1, 10)) if c == "#" else c for c in rule["digits"])


def _draw_date(rng, rule: dict, corpus, numbers, name) -> str:
    """{date = "%d %B %Y"}: a moment of the years 2020 to 2029, as strftime writes it."""
    minutes = int(rng.integers(10 * 365 * 24 * 12)) * 5
    return (datetime.datetime(2020, 1, 1) + datetime.timedelta(minutes=minutes)).strftime(rule["date"])


_RULES: dict[str, Callable[..., str | None]] = {
    "corpus": _draw_passage,
    "number": _draw_number,
    "sum": _add_up,
    "digits": _draw_digits,
    "date": _draw_date,
}
