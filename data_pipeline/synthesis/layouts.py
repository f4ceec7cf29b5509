"""Complex text: slides, posters, forms, screens and receipts by rule-based replacement in templates."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from data_pipeline.buckets import buckets
from data_pipeline.synthesis.corpus import Corpus, language_of
from data_pipeline.synthesis.fonts import Face, choose_face
from data_pipeline.synthesis.photos import View, draw_crop, load_photo
from data_pipeline.synthesis.picture import Picture, draw_size
from data_pipeline.synthesis.templates import Element, Template, draw_fields
from data_pipeline.synthesis.typesetting import Line, Style, fit_passage, shift

LEAST_PX = {"english": 11, "chinese": 13, "mixed": 13, "other": 13}
LEAST_SIDE = 192
"""Layouts of a smaller area have no room for readable type."""
_SUPERSAMPLING = 3


@dataclass(frozen=True)
class Sheet:
    """Everything that decides a layout picture."""

    size: tuple[int, int]
    """(h, w)."""
    template: Template
    palette: dict[str, tuple[int, int, int]]
    values: dict[str, str]
    faces: dict[str, Face]
    shown: tuple[Element, ...]
    photos: tuple[Image.Image, ...]
    """One for each photo element."""
    bars: np.ndarray
    """Heights, 0 to 1."""


def make(
    rng: np.random.Generator,
    side: int,
    templates: tuple[Template, ...],
    corpus: Corpus,
    faces: tuple[Face, ...],
    views: tuple[View, ...],
) -> Picture:
    """A filled-in template; words that no face covers or that don't fit are dropped with the whole picture.

    Raises ValueError for a side under 192 px, or if no template can be filled in.
    """
    if side < LEAST_SIDE:
        raise ValueError(f"layouts have no room for type at {side} px; use at least {LEAST_SIDE}")
    for _ in range(300):
        template = templates[rng.integers(len(templates))]
        ratios = {h / w for h, w in _sizes(template, side)}
        size = draw_size(rng, side, lambda h, w: h / w in ratios)  # noqa: B023
        language = list(template.wordings)[rng.integers(len(template.wordings))]
        wording = template.wordings[language]
        values = draw_fields(rng, wording, corpus)
        sheet = None if values is None else draw_sheet(rng, size, template, values, faces, views)
        drawn = None if sheet is None else render(sheet)
        if drawn is not None:
            caption = wording.captions[rng.integers(len(wording.captions))].format(**values)
            return Picture(drawn[0], caption, drawn[1], {"language": language, "template": template.name})
    raise ValueError(f"no template can be filled in at {side} px with the fonts that are here")


def _sizes(template: Template, side: int) -> list[tuple[int, int]]:
    """(h, w) of the buckets of `side` that are nearest to the template's ratios."""
    of_ratio = [min(buckets(side), key=lambda b: abs(np.log(b[0] / b[1] * h / w))) for w, h in template.ratios]
    return [(h, w) for w, h in of_ratio]


def draw_sheet(rng, size, template: Template, values, faces, views: tuple[View, ...]) -> Sheet | None:
    height, width = size
    palette = template.palettes[rng.integers(len(template.palettes))]
    shown = tuple(e for e in template.elements if e.chance >= 1 or rng.random() < e.chance)
    chosen = {}
    for role, looks in template.faces.items():
        words = "".join(e.text.format(**values) for e in shown if e.kind == "text" and e.face == role)
        suited = tuple(f for f in faces if f.look in looks)
        chosen[role] = choose_face(suited, words, rng) or choose_face(faces, words, rng)
        if chosen[role] is None:
            return None
    photos = []
    for element in shown:
        if element.kind == "photo":
            x0, y0, x1, y1 = _pixels(element, size)
            crop = None
            while crop is None:
                view = views[rng.integers(len(views))]
                photo = load_photo(view.path)
                crop = draw_crop(rng, photo.size, view, (x1 - x0) / (y1 - y0))
            photos.append(photo.resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS, box=crop))
    colors = {name: ImageColor.getrgb(color) for name, color in palette.items()}
    return Sheet(size, template, colors, values, chosen, shown, tuple(photos), rng.uniform(0.2, 1.0, 8))


def render(sheet: Sheet) -> tuple[np.ndarray, tuple[Line, ...]] | None:
    """The picture, uint8 [h, w, 3], and its lines; None if some text doesn't fit."""
    height, width = sheet.size
    image = _draw_ground(sheet)
    lines: list[Line] = []
    for element in sheet.shown:
        if element.kind != "text":
            continue
        text = element.text.format(**sheet.values)
        if not text.strip():
            continue
        x0, y0, x1, y1 = _pixels(element, sheet.size)
        px = round(element.size * (height * width) ** 0.5)
        least = LEAST_PX[language_of(text)]
        style = Style(sheet.faces[element.face], max(px, least), element.leading, align=element.align)
        block = fit_passage(text, style, x1 - x0, y1 - y0, least)
        if block is None:
            return None
        h, w = block.coverage.shape
        x = x0 + {"left": 0, "center": (x1 - x0 - w) // 2, "right": x1 - x0 - w}[element.align]
        y = y0 + {"top": 0, "middle": (y1 - y0 - h) // 2, "bottom": y1 - y0 - h}[element.valign]
        alpha = block.coverage[:, :, None] / 255
        image[y : y + h, x : x + w] += alpha * (np.array(sheet.palette[element.color]) - image[y : y + h, x : x + w])
        lines += shift(block, x, y).lines
    return np.round(image).astype(np.uint8), tuple(lines)


def _draw_ground(sheet: Sheet) -> np.ndarray:
    """Everything but text, float [h, w, 3]."""
    height, width = sheet.size
    k, side = _SUPERSAMPLING, (height * width) ** 0.5
    canvas = Image.new("RGB", (width * k, height * k), sheet.palette["ground"])
    draw = ImageDraw.Draw(canvas)
    photos = iter(sheet.photos)
    for element in sheet.shown:
        x0, y0, x1, y1 = (v * k for v in _pixels(element, sheet.size))
        fill, outline = (sheet.palette[c] if c else None for c in (element.fill, element.outline))
        edge = round(element.width * side * k) if element.outline else 0
        if element.kind == "rect":
            draw.rounded_rectangle((x0, y0, x1 - 1, y1 - 1), element.radius * side * k, fill, outline, edge)
        elif element.kind == "ellipse":
            draw.ellipse((x0, y0, x1 - 1, y1 - 1), fill, outline, edge)
        elif element.kind == "photo":
            canvas.paste(next(photos).resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC), (x0, y0))
        elif element.kind == "bars":
            step = (x1 - x0) / len(sheet.bars)
            for i, tall in enumerate(sheet.bars):
                left = x0 + i * step
                draw.rectangle((left, y1 - tall * (y1 - y0), left + 0.65 * step, y1 - 1), fill)
    return np.asarray(canvas.reduce(k), dtype=np.float64).copy()


def _pixels(element: Element, size: tuple[int, int]) -> tuple[int, int, int, int]:
    height, width = size
    x0, y0, x1, y1 = element.box
    x0, y0 = round(x0 * width), round(y0 * height)
    return x0, y0, max(x0 + 1, round(x1 * width)), max(y0 + 1, round(y1 * height))
