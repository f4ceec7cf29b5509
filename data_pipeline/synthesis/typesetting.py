"""Sets a passage in a face and draws it, with the box of every line.

A line's box is that of its drawn pixels, (x0, y0, x1, y1) with x1 and y1 one past the last pixel. Drawing is in
coverage (0 to 255), so that pictures, surfaces and layouts can blend ink as they need.
"""

import functools
import itertools
import math
import unicodedata
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from data_pipeline.synthesis.fonts import Face
from data_pipeline.synthesis.line_breaking import break_lines, breaks_well, is_ideographic, split_units

Align = Literal["left", "center", "right", "justify"]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Style:
    """How a passage is set."""

    face: Face
    px: int
    """Pixels per em."""
    leading: float = 1.3
    """Distance of lines (of columns, if vertical), in em."""
    tracking: float = 0.0
    """Space added after every character, in em."""
    align: Align = "left"
    vertical: bool = False
    """Characters from top to bottom, columns from right to left; Latin words lie on their side."""


@dataclass(frozen=True)
class Line:
    """A drawn line: its text and the box of its pixels."""

    text: str
    box: Box


@dataclass(frozen=True)
class Block:
    """A drawn passage: coverage uint8 [h, w] and its lines."""

    coverage: np.ndarray
    lines: tuple[Line, ...]


def set_passage(text: str, style: Style, width: int, height: int) -> Block | None:
    """Draw `text` in lines of `width` (columns of `height`, if vertical) pixels; the block is cut to its ink.

    None if it doesn't fit into width x height or can't be shaped; an empty block for a text without ink.
    """
    if _needs_shaping(text) and not features.check("raqm"):
        return None
    along = height if style.vertical else width
    lines = break_lines(text, along, functools.partial(_advance, style))
    if lines is None:
        return None
    across = width if style.vertical else height
    pitch = style.px * style.leading
    if pitch * (len(lines) - 1) + style.px > across:
        return None
    layers = [_draw_line(line, style, along, _is_last(lines, i, text)) for i, line in enumerate(lines)]
    margin = style.px
    canvas = Image.new("L", (width + 2 * margin, height + 2 * margin))
    drawn = []
    for i, (line, layer) in enumerate(zip(lines, layers, strict=True)):
        ink = layer.getbbox()
        if ink is None:
            continue
        x, y = (round(width - style.px - i * pitch), 0) if style.vertical else (0, round(i * pitch))
        box = (ink[0] + x, ink[1] + y, ink[2] + x, ink[3] + y)
        canvas.paste(255, box[:2], layer.crop(ink))
        drawn.append(Line(line, box))
    block = _trim(Block(np.asarray(canvas), tuple(drawn)))
    return block if block.coverage.shape[0] <= height and block.coverage.shape[1] <= width else None


def fit_passage(text: str, style: Style, width: int, height: int, least_px: int) -> Block | None:
    """`set_passage` at the largest size from `style.px` down to `least_px` that fits; None if none does.

    Where that breaks Chinese lines badly, shorter lines and sizes of at least .6 of it are tried for better ones.
    """
    px, largest, smallest = style.px, None, least_px
    while px >= smallest:
        for share in (1.0, 0.85, 0.7):
            room = (width, round(share * height)) if style.vertical else (round(share * width), height)
            block = set_passage(text, replace(style, px=px), *room)
            if block is None:
                break
            if breaks_well([line.text for line in block.lines]):
                return block
            if largest is None:
                largest, smallest = block, max(least_px, math.ceil(0.6 * px))
        px = min(px - 1, int(px * 0.92))
    return largest


def _trim(block: Block) -> Block:
    if not block.lines:
        return Block(np.zeros((1, 1), np.uint8), ())
    boxes = np.array([line.box for line in block.lines])
    (x0, y0), (x1, y1) = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    return shift(Block(block.coverage[y0:y1, x0:x1], block.lines), -int(x0), -int(y0))


def shift(block: Block, dx: int, dy: int) -> Block:
    """The same coverage with boxes moved by (dx, dy)."""
    moved = (Line(n.text, (n.box[0] + dx, n.box[1] + dy, n.box[2] + dx, n.box[3] + dy)) for n in block.lines)
    return Block(block.coverage, tuple(moved))


def _needs_shaping(text: str) -> bool:
    return any(unicodedata.bidirectional(c) in ("R", "AL") or unicodedata.category(c) in ("Mn", "Mc") for c in text)


def _font(style: Style, text: str) -> ImageFont.FreeTypeFont:
    return style.face.at(style.px, _needs_shaping(text))


def _pieces(text: str, style: Style) -> list[str]:
    """What is drawn at once: the line, or its characters where space goes between them."""
    return list(text) if style.tracking and not _needs_shaping(text) else [text]


def _advance(style: Style, text: str) -> float:
    font, gap = _font(style, text), style.tracking * style.px
    if style.vertical:
        return sum(cell.length + gap for cell in _cells(text, style))
    pieces = _pieces(text, style)
    return sum(font.getlength(p) for p in pieces) + gap * (len(pieces) - 1)


def _is_last(lines: list[str], i: int, text: str) -> bool:
    """Whether line i ends a paragraph, which justified setting leaves alone."""
    ends = np.cumsum([len(p.replace(" ", "")) for p in text.split("\n")])
    return bool(np.isin(sum(len(line.replace(" ", "")) for line in lines[: i + 1]), ends))


def _draw_line(line: str, style: Style, along: int, is_last: bool) -> Image.Image:
    """One line in a layer with a margin of one em on every side."""
    if style.vertical:
        return _draw_column(line, style, along)
    font, px = _font(style, line), style.px
    layer = Image.new("L", (along + 2 * px, 3 * px))
    draw = ImageDraw.Draw(layer)
    pieces, gap = _pieces(line, style), style.tracking * px
    slack = along - _advance(style, line)
    x = {"center": slack / 2, "right": slack}.get(style.align, 0.0)
    if style.align == "justify" and not is_last and not _needs_shaping(line):
        units = split_units(line)
        if len(units) > 1 and slack < 0.35 * along and slack < 0.6 * px * (len(units) - 1):
            spread = (along - 2 - sum(_advance(style, u) for u in units)) / (len(units) - 1)
            for unit in units:
                draw.text((round(px + x), 2 * px), unit.rstrip(), 255, font, anchor="ls")
                x += _advance(style, unit) + spread
            return layer
    for piece in pieces:
        draw.text((round(px + x), 2 * px), piece, 255, font, anchor="ls")
        x += font.getlength(piece) + gap
    return layer


@dataclass(frozen=True)
class _Cell:
    """What stands or lies together in a column."""

    text: str
    length: float
    """Along the column, in pixels."""
    turned: bool
    """Lies on its side."""


_TURNED = frozenset("（）《》〈〉「」『』【】〔〕〖〗～ー－｛｝［］：；")
_RAISED = frozenset("、。，．")
"""Full-width marks that turn with the line, and those that move to the upper right of their square."""


def _cells(text: str, style: Style) -> list[_Cell]:
    """Full-width characters one by one, and runs of others: one or two digits stand, the rest lies down."""
    cells = []
    for wide, run in itertools.groupby(text, is_ideographic):
        if wide:
            cells += [_Cell(char, style.px, char in _TURNED) for char in run]
        else:
            words = "".join(run)
            stands = words.isdigit() and len(words) <= 2
            cells.append(_Cell(words, style.px if stands else _font(style, words).getlength(words), not stands))
    return cells


def _draw_column(line: str, style: Style, along: int) -> Image.Image:
    font, px = _font(style, line), style.px
    layer = Image.new("L", (3 * px, along + 2 * px))
    slack = along - _advance(style, line)
    y = px + {"center": slack / 2, "right": slack}.get(style.align, 0.0)
    for cell in _cells(line, style):
        glyph = Image.new("L", (math.ceil(cell.length) + px, 2 * px))
        raised = 0.55 * px if cell.text in _RAISED else 0
        # The baseline lies so that the middle of an em square, or of a capital letter, meets the column's middle.
        at = (px / 2 + cell.length / 2 + raised, px * 1.37 - raised)
        ImageDraw.Draw(glyph).text(at, cell.text, 255, font, anchor="ms")
        if cell.turned:
            glyph = glyph.transpose(Image.Transpose.ROTATE_270)
        _lighten(layer, glyph, (round(1.5 * px - glyph.width / 2), round(y + cell.length / 2 - glyph.height / 2)))
        y += cell.length + style.tracking * px
    return layer


def _lighten(layer: Image.Image, glyph: Image.Image, at: tuple[int, int]) -> None:
    layer.paste(255, at, glyph)
