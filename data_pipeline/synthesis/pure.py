"""Pure text: a passage on a plain ground (the report's pure rendering)."""

from dataclasses import dataclass

import numpy as np

from data_pipeline.buckets import buckets
from data_pipeline.synthesis.colors import CHINESE, NAMED, RGB, choose_pair, jitter
from data_pipeline.synthesis.corpus import Corpus, language_of
from data_pipeline.synthesis.fonts import Face, choose_face
from data_pipeline.synthesis.line_breaking import has_chinese
from data_pipeline.synthesis.picture import Picture, draw_size
from data_pipeline.synthesis.typesetting import Block, Style, fit_passage, set_passage, shift

LEAST_PX = {"english": 14, "chinese": 16, "mixed": 16, "other": 16}
"""Smallest type that stays readable after a VAE with 8 x 8 pixels a latent."""
WEIGHTS = {"english": 4, "chinese": 4, "mixed": 2, "other": 2}
ALIGNMENTS = {"left": "left-aligned", "center": "centered", "right": "right-aligned", "justify": "justified"}


@dataclass(frozen=True)
class Page:
    """Everything that decides a pure picture."""

    size: tuple[int, int]
    """(h, w) in pixels."""
    text: str
    style: Style
    least_px: int
    ink: RGB
    ground: tuple[RGB, RGB]
    """Colours of the ground at the top and at the bottom."""
    anchor: tuple[float, float]
    """Where the block lies in the free space, 0 to 1 in y and x."""


def make(
    rng: np.random.Generator,
    side: int,
    corpus: Corpus,
    faces: tuple[Face, ...],
    passage: str | None = None,
) -> Picture:
    """A passage of the corpus (or the given one) in a random style, at the area of a square of `side` pixels.

    A passage that no face covers, or that doesn't fit, is dropped whole and another one drawn. Raises ValueError if
    nothing can be drawn.
    """
    for _ in range(1000):
        page, names = draw_page(rng, draw_size(rng, side), corpus, faces, passage)
        drawn = None if page is None else render(page)
        if drawn is not None:
            image, block = drawn
            style = page.style
            record = {"language": language_of(page.text), "font": style.face.name, "vertical": style.vertical}
            return Picture(image, write_caption(rng, page, names, block), block.lines, record)
    what = "any passage of the corpus" if passage is None else repr(passage)
    raise ValueError(f"no font here draws {what} so that it fits a picture of {side} px")


def can_show(text: str, side: int, faces: tuple[Face, ...]) -> bool:
    """Whether a face covers `text` and it fits some ratio at `side` pixels in the smallest type."""
    face = next((face for face in faces if face.covers(text)), None)
    px = _least_px(language_of(text), side)
    return face is not None and any(
        set_passage(text, Style(face, px), w - 2 * _margin(h, w), h - 2 * _margin(h, w)) for w, h in buckets(side)
    )


def _least_px(language: str, side: float) -> int:
    return max(LEAST_PX[language], round(0.02 * side))


def _margin(height: int, width: int) -> int:
    return max(2, round(0.05 * min(height, width)))


def draw_page(
    rng: np.random.Generator,
    size: tuple[int, int],
    corpus: Corpus,
    faces: tuple[Face, ...],
    passage: str | None = None,
) -> tuple[Page | None, tuple[str, str]]:
    """A random page of `size` (h, w) and the names of its ink and ground; no page if no face covers the passage."""
    height, width = size
    side = (height * width) ** 0.5
    names = choose_pair(rng)
    language = _draw_language(rng, corpus) if passage is None else language_of(passage)
    vertical = language == "chinese" and height >= 0.75 * width and rng.random() < 0.25
    least_px = _least_px(language, side)
    px = round(least_px * (0.4 * side / least_px) ** rng.random())
    leading = rng.uniform(1.2, 1.7)
    tracking = rng.uniform(0.02, 0.15) if rng.random() < 0.2 else 0.0
    if passage is None:
        capacity = 0.75 * (0.9 * height) * (0.9 * width) / (px * px * leading * (1 + tracking))
        text = corpus.draw(rng, language, capacity)
        text = _change_case(rng, text) if text and language == "english" else text
    else:
        text = passage
    face = choose_face(faces, text, rng) if text else None
    if face is None:
        return None, names
    aligns = ("left", "center") if vertical else ("left", "left", "center", "right", "justify")
    style = Style(face, px, leading, tracking, aligns[rng.integers(len(aligns))], vertical)
    ground = jitter(rng, NAMED[names[1]])
    bottom = jitter(rng, NAMED[names[1]], 16) if rng.random() < 0.3 else ground
    anchor = tuple(rng.choice((0.0, 0.5, 0.5, 1.0, rng.random()), 2))
    return Page(size, text, style, least_px, jitter(rng, NAMED[names[0]]), (ground, bottom), anchor), names


def _draw_language(rng: np.random.Generator, corpus: Corpus) -> str:
    languages = list(corpus.passages)
    weights = np.array([WEIGHTS[name] for name in languages], float)
    return languages[rng.choice(len(languages), p=weights / weights.sum())]


def render(page: Page) -> tuple[np.ndarray, Block] | None:
    """The page as uint8 [h, w, 3] and its block with boxes in the picture; None if the passage doesn't fit.

    Without text it is a blank page.
    """
    height, width = page.size
    margin = _margin(height, width)
    block = fit_passage(page.text, page.style, width - 2 * margin, height - 2 * margin, page.least_px)
    if block is None:
        return None
    h, w = block.coverage.shape
    y = margin + round((height - 2 * margin - h) * page.anchor[0])
    x = margin + round((width - 2 * margin - w) * page.anchor[1])
    mix = np.linspace(0, 1, height)[:, None, None]
    image = np.broadcast_to((1 - mix) * page.ground[0] + mix * page.ground[1], (height, width, 3)).copy()
    alpha = block.coverage[:, :, None] / 255
    image[y : y + h, x : x + w] += alpha * (np.array(page.ink) - image[y : y + h, x : x + w])
    return np.round(image).astype(np.uint8), shift(block, x, y)


def _change_case(rng: np.random.Generator, text: str) -> str:
    choice = rng.random()
    if len(text) > 40 or choice < 0.6:
        return text
    return text.upper() if choice < 0.85 else text.lower()


def write_caption(rng: np.random.Generator, page: Page, names: tuple[str, str], block: Block) -> str:
    """A caption that quotes the passage, in Chinese for half of the Chinese passages."""
    ink, ground = names
    quoted = page.text
    if has_chinese(quoted) and rng.random() < 0.5:
        vertical = "竖排" if page.style.vertical else ""
        forms = (
            f"{CHINESE[ground]}背景上写着“{quoted}”，{vertical}{CHINESE[ink]}字。",
            f"{CHINESE[ink]}的{vertical}文字“{quoted}”，背景是{CHINESE[ground]}。",
            f"一张{CHINESE[ground]}的图片，上面用{CHINESE[ink]}{vertical}写着“{quoted}”。",
        )
        return forms[rng.integers(len(forms))]
    look = f"{page.style.face.look} " if page.style.face.look else ""
    layout = "vertical " if page.style.vertical else ""
    if not layout and len(block.lines) > 2:
        layout = f"{ALIGNMENTS[page.style.align]} "
    forms = (
        f'The text "{quoted}" in {layout}{look}{ink} letters on a {ground} background.',
        f'A plain {ground} background with {layout}{look}{ink} text that reads "{quoted}".',
        f'"{quoted}" written in {layout}{look}{ink} type on {ground}.',
        f'{ground.capitalize()} card, {layout}{look}{ink} text: "{quoted}".',
    )
    return forms[rng.integers(len(forms))]
