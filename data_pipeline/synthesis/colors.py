"""Named colours, and how well one reads on another."""

import numpy as np

RGB = tuple[int, int, int]

NAMED: dict[str, RGB] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "dark gray": (60, 62, 66),
    "light gray": (214, 216, 220),
    "red": (198, 28, 36),
    "dark red": (112, 16, 28),
    "orange": (240, 130, 24),
    "yellow": (250, 214, 48),
    "green": (30, 132, 62),
    "dark green": (16, 66, 42),
    "light green": (196, 230, 190),
    "teal": (12, 116, 122),
    "blue": (28, 84, 196),
    "navy": (18, 30, 78),
    "light blue": (190, 220, 246),
    "purple": (104, 44, 150),
    "pink": (248, 184, 206),
    "brown": (98, 58, 30),
    "beige": (240, 228, 202),
    "cream": (254, 248, 228),
}
_CHINESE_NAMES = (
    "白色 黑色 深灰色 浅灰色 红色 深红色 橙色 黄色 绿色 深绿色 浅绿色 青色 蓝色 藏青色 浅蓝色 "
    "紫色 粉色 棕色 米色 奶油色"
)
CHINESE = dict(zip(NAMED, _CHINESE_NAMES.split(), strict=True))


def contrast(a: RGB, b: RGB) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def _luminance(rgb: RGB) -> float:
    c = np.asarray(rgb) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def choose_pair(rng: np.random.Generator, least: float = 4.5) -> tuple[str, str]:
    """Names of an ink and a ground whose contrast is at least `least`."""
    names = list(NAMED)
    ground = names[rng.integers(len(names))]
    inks = [n for n in names if contrast(NAMED[n], NAMED[ground]) >= least]
    return (inks[rng.integers(len(inks))], ground) if inks else choose_pair(rng, least)


def jitter(rng: np.random.Generator, rgb: RGB, amount: int = 6) -> RGB:
    """A colour near `rgb` that still has its name."""
    r, g, b = np.clip(np.asarray(rgb) + rng.integers(-amount, amount + 1, 3), 0, 255)
    return int(r), int(g), int(b)
