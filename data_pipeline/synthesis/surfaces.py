"""Things that carry writing: paper, wood, signs, screens, chalkboards, cardboard, sticky notes.

A surface is drawn flat, as float64 [h, w, 3] in 0 to 255, by a function of random numbers; scenes put it in
perspective.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from data_pipeline.synthesis.colors import NAMED, RGB

Paint = Callable[[np.random.Generator, int, int], np.ndarray]


@dataclass(frozen=True)
class Surface:
    """A kind of carrier."""

    phrase: str
    """For captions: 'a sheet of paper'."""
    chinese: str
    paint: Paint
    inks: tuple[RGB, ...]
    mounts: tuple[str, ...]
    """standing, lying."""
    margin: float = 0.08
    """Free border, as a share of the shorter side."""
    lit: bool = False
    """Shines by itself, so that the scene's light doesn't shade it."""


def _noise(rng: np.random.Generator, h: int, w: int, cell_y: float, cell_x: float) -> np.ndarray:
    """Smooth noise [h, w] of unit deviation whose features are cell_y x cell_x pixels."""
    small = rng.standard_normal((max(2, round(h / cell_y)), max(2, round(w / cell_x)))).astype(np.float32)
    return cv2.resize(small, (w, h), interpolation=cv2.INTER_CUBIC)


def _flat(h: int, w: int, rgb) -> np.ndarray:
    return np.broadcast_to(np.asarray(rgb, dtype=np.float64), (h, w, 3)).copy()


def _paper(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    image = _flat(h, w, rng.choice([(250, 249, 245), (246, 238, 220), (252, 252, 252), (238, 232, 214)]))
    image += 1.5 * _noise(rng, h, w, 2, 2)[:, :, None] + 2.5 * _noise(rng, h, w, h / 5, w / 5)[:, :, None]
    if rng.random() < 0.4:  # a fold: the light changes across it
        at = rng.uniform(0.35, 0.65)
        along = np.linspace(0, 1, h)[:, None] if rng.random() < 0.5 else np.linspace(0, 1, w)[None, :]
        image *= (1 - 0.07 * (along > at) - 0.1 * np.exp(-(((along - at) * 120) ** 2)))[:, :, None] + np.zeros(
            (h, w, 1)
        )
    return image


def _wood(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    base = np.asarray(rng.choice([(178, 128, 80), (196, 154, 104), (206, 176, 134)]), dtype=np.float64)
    planks = int(rng.integers(1, 4))
    edges = np.linspace(0, h, planks + 1).round().astype(int)
    image = np.empty((h, w, 3))
    for top, bottom in zip(edges[:-1], edges[1:], strict=True):
        rows = bottom - top
        bend = _noise(rng, rows, w, rows / 2, w / 2)
        rings = np.sin(2 * np.pi * (np.linspace(0, rng.uniform(3, 7), rows)[:, None] + 0.35 * bend))
        streaks = _noise(rng, rows, w, 1.5, w / 6)
        tone = 1 + 0.05 * rings + 0.045 * streaks + rng.uniform(-0.06, 0.06)
        image[top:bottom] = base * tone[:, :, None]
        image[bottom - max(1, h // 120) : bottom] *= 0.55
    return image


def _sign(rng: np.random.Generator, h: int, w: int, rgb: RGB, edge: RGB) -> np.ndarray:
    image = _flat(h, w, rgb)
    inset, line = round(0.03 * min(h, w)), max(2, round(0.02 * min(h, w)))
    cv2.rectangle(image, (inset, inset), (w - 1 - inset, h - 1 - inset), edge, line, cv2.LINE_AA)
    image *= np.linspace(1.04, 0.94, h)[:, None, None]
    return image + 1.2 * _noise(rng, h, w, 3, 3)[:, :, None]


def _blue_sign(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    return _sign(rng, h, w, (20, 82, 160), (240, 244, 250))


def _green_sign(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    return _sign(rng, h, w, (10, 104, 66), (240, 250, 244))


def _yellow_sign(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    return _sign(rng, h, w, (248, 202, 36), (24, 22, 18))


def _white_sign(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    return _sign(rng, h, w, (244, 244, 240), (180, 24, 32))


def _screen(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    image = _flat(h, w, (22, 23, 26))
    inset = round(0.05 * min(h, w))
    top, bottom = np.asarray(rng.choice([[(16, 30, 66), (34, 74, 140)], [(8, 14, 16), (12, 52, 54)]]), dtype=np.float64)
    ramp = np.linspace(0, 1, h - 2 * inset)[:, None, None]
    image[inset : h - inset, inset : w - inset] = (1 - ramp) * top + ramp * bottom
    y, x = np.mgrid[0:h, 0:w]
    glare = np.clip(1 - np.abs((x / w + y / h) - rng.uniform(0.4, 1.6)) * 4, 0, 1)
    return image + 14 * glare[:, :, None]


def _chalkboard(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    image = _flat(h, w, rng.choice([(38, 62, 52), (44, 46, 50)]))
    image += 5 * _noise(rng, h, w, h / 4, w / 3)[:, :, None] + 2 * _noise(rng, h, w, 2, 12)[:, :, None]
    line = max(2, round(0.05 * min(h, w)))
    cv2.rectangle(image, (0, 0), (w - 1, h - 1), (150, 108, 66), 2 * line, cv2.LINE_AA)
    return image


def _cardboard(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    image = _flat(h, w, rng.choice([(186, 148, 104), (172, 132, 88)]))
    flutes = np.sin(np.arange(w) * 2 * np.pi / max(6, w // 45))
    return image + 2.5 * flutes[None, :, None] + 3 * _noise(rng, h, w, 3, 3)[:, :, None]


def _note(rng: np.random.Generator, h: int, w: int, rgb: RGB) -> np.ndarray:
    image = _flat(h, w, rgb) * np.linspace(1.0, 0.9, h)[:, None, None]
    return image + 1.5 * _noise(rng, h, w, 2, 2)[:, :, None]


def _yellow_note(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    return _note(rng, h, w, (252, 232, 110))


def _pink_note(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    return _note(rng, h, w, (252, 172, 196))


_PENS = (NAMED["black"], NAMED["navy"], (20, 50, 130), NAMED["dark red"], NAMED["dark green"])
_BURNT = ((46, 26, 12), (28, 18, 10))
_CHALK = ((244, 244, 238), (250, 232, 150), (190, 222, 246))

SURFACES: dict[str, Surface] = {
    "paper": Surface("a sheet of paper", "一张纸", _paper, _PENS, ("lying",)),
    "wood": Surface("a wooden board", "一块木板", _wood, _BURNT, ("lying", "standing")),
    "blue sign": Surface("a blue sign", "蓝色标牌", _blue_sign, ((255, 255, 255),), ("standing",), 0.1),
    "green sign": Surface("a green sign", "绿色标牌", _green_sign, ((255, 255, 255),), ("standing",), 0.1),
    "yellow sign": Surface("a yellow sign", "黄色标牌", _yellow_sign, ((16, 14, 12),), ("standing",), 0.1),
    "white sign": Surface(
        "a white sign with a red edge", "红边白色标牌", _white_sign, ((20, 20, 24), (176, 20, 28)), ("standing",), 0.1
    ),
    "screen": Surface(
        "a screen",
        "屏幕",
        _screen,
        ((240, 246, 255), (120, 230, 200), (255, 214, 110)),
        ("lying", "standing"),
        0.12,
        True,
    ),
    "chalkboard": Surface("a chalkboard", "黑板", _chalkboard, _CHALK, ("lying", "standing"), 0.13),
    "cardboard": Surface("a piece of cardboard", "一块纸板", _cardboard, (_PENS[0], _PENS[1], _PENS[3]), ("lying",)),
    "yellow note": Surface("a yellow sticky note", "黄色便签", _yellow_note, _PENS, ("lying",)),
    "pink note": Surface("a pink sticky note", "粉色便签", _pink_note, _PENS, ("lying",)),
}
