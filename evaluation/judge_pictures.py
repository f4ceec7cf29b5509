"""Training pictures of the judge: shapes under domain randomisation; shares no code with the data's renderer.

Shades, proportions, rotations, textures, gradients, sizes, crowding and cropping vary far beyond the shapes world's;
other shapes (crosses, rings, crescents, bars, blobs) and other colours appear as what not to find; then blur, noise,
resampling, JPEG, exposure. Shapes are drawn as signed distance fields, so that edges and overlaps are exact.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

SHAPES = ("circle", "square", "triangle", "star")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
OTHER = len(COLORS)
"""Index of "another colour"."""

_HSV_RANGES = {
    "red": ((350, 369), (0.70, 1.0), (0.60, 1.0)),
    "orange": ((21, 37), (0.75, 1.0), (0.88, 1.0)),
    "yellow": ((46, 61), (0.60, 1.0), (0.85, 1.0)),
    "green": ((95, 160), (0.45, 1.0), (0.35, 0.90)),
    "blue": ((208, 240), (0.60, 1.0), (0.45, 1.0)),
    "purple": ((264, 292), (0.45, 1.0), (0.40, 0.85)),
    "pink": ((318, 350), (0.30, 0.62), (0.88, 1.0)),
    "brown": ((14, 33), (0.55, 0.95), (0.28, 0.58)),
}
"""Hue in degrees, saturation and value of each colour's shades."""


@dataclass(frozen=True)
class Labelled:
    """A picture, uint8 [side, side, 3], with its objects: class index, colour index, box [x0, y0, x1, y1] in pixels."""

    image: np.ndarray
    classes: list[int]
    colors: list[int]
    boxes: list[tuple[float, float, float, float]]


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    hsv = np.array([[[hue % 360, saturation, value]]], np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0] * 255


def _shade(rng: np.random.Generator, color: int) -> np.ndarray:
    if color < OTHER:
        return _rgb(*(rng.uniform(*r) for r in _HSV_RANGES[COLORS[color]]))
    kind = rng.integers(3)
    if kind == 0:
        return np.full(3, rng.uniform(0, 255))
    if kind == 1:
        return _rgb(rng.uniform(172, 192), rng.uniform(0.5, 1), rng.uniform(0.5, 1))
    return _rgb(rng.uniform(60, 80), rng.uniform(0.5, 1), rng.uniform(0.3, 0.6))


def _background(rng: np.random.Generator, side: int) -> np.ndarray:
    if rng.random() < 0.85:
        gray = rng.choice([rng.uniform(0, 60), rng.uniform(120, 190), rng.uniform(190, 255)], p=[0.3, 0.2, 0.5])
        base = np.clip(gray + rng.uniform(-22, 22, 3), 0, 255)
    else:
        base = _rgb(rng.uniform(0, 360), rng.uniform(0, 0.35), rng.uniform(0.1, 1))
    canvas = np.broadcast_to(base, (side, side, 3)).astype(np.float32)
    kind = rng.random()
    if kind < 0.25:
        canvas = canvas + _gradient(rng, side) * rng.uniform(-25, 25, 3)
    elif kind < 0.45:
        canvas = canvas + _texture(rng, side, int(rng.integers(3, 24))) * rng.uniform(2, 12)
    return np.clip(canvas, 0, 255, dtype=np.float32)


def _gradient(rng: np.random.Generator, side: int) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    return (np.cos(angle) * x + np.sin(angle) * y)[..., None].astype(np.float32)


def _texture(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    coarse = rng.standard_normal((cells, cells, 3 if rng.random() < 0.5 else 1)).astype(np.float32)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC).reshape(side, side, -1)


def _polygon_distance(points: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a closed polygon [N, 2], negative inside."""
    closest = np.full(x.shape, np.inf, np.float32)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, 0), strict=True):
        ex, ey = bx - ax, by - ay
        t = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        closest = np.minimum(closest, (x - ax - t * ex) ** 2 + (y - ay - t * ey) ** 2)
        inside ^= ((ay > y) != (by > y)) & (x < ex * (y - ay) / (ey if ey else 1e-9) + ax)
    return np.where(inside, -1, 1) * np.sqrt(closest)


def _ring_points(count: int, radii: list[float], start: float) -> np.ndarray:
    angle = start + np.arange(count) * 2 * np.pi / count
    r = np.resize(np.asarray(radii, np.float32), count)
    return np.stack([r * np.cos(angle), r * np.sin(angle)], 1).astype(np.float32)


def _distance(rng: np.random.Generator, shape: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance, in radii, of a shape of radius about 1 at the origin; index 4 is some other shape."""
    round_off = rng.uniform(0, 0.10)
    if shape == 0:
        return np.hypot(x, y) - 1
    if shape == 1:
        aspect = rng.uniform(0.9, 1.11)
        points = _ring_points(4, [1.22 - round_off], np.pi / 4) * np.array([aspect, 1 / aspect], np.float32)
    elif shape == 2:
        stretch = rng.uniform(0.87, 1.15)
        points = _ring_points(3, [1.3 - round_off], -np.pi / 2) * np.array([stretch, 1 / stretch], np.float32)
    elif shape == 3:
        points = _ring_points(10, [1.3 - round_off, rng.uniform(0.46, 0.72)], -np.pi / 2)
    else:
        return _other_distance(rng, x, y)
    return _polygon_distance(points, x, y) - round_off


def _other_distance(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    kind = rng.integers(6)
    disk = np.hypot(x, y) - 1
    if kind == 0:
        thick = rng.uniform(0.2, 0.33)
        return np.minimum(np.maximum(abs(x) - 1.1, abs(y) - thick), np.maximum(abs(y) - 1.1, abs(x) - thick))
    if kind == 1:
        return abs(np.hypot(x, y) - 0.8) - rng.uniform(0.12, 0.25)
    if kind == 2:
        return np.maximum(disk, -(np.hypot(x - rng.uniform(0.4, 0.7), y) - 0.95))
    if kind == 3:
        return np.maximum(abs(x) - 1.3, abs(y) - rng.uniform(0.12, 0.5))
    if kind == 4:
        return np.maximum(disk, x - rng.uniform(-0.2, 0.3))
    phase, lobes = rng.uniform(0, 6.28), rng.integers(2, 4)
    r = np.hypot(x, y)
    return r - 0.85 - rng.uniform(0.2, 0.4) * np.sin(lobes * np.arctan2(y, x) + phase) * np.minimum(r, 1)


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _paint(rng: np.random.Generator, canvas: np.ndarray) -> Labelled:
    """Put 0 to 7 shapes on a canvas, later ones over earlier ones; shapes mostly hidden are not labelled."""
    side = canvas.shape[0]
    count = int(rng.choice(8, p=[0.04, 0.16, 0.26, 0.19, 0.15, 0.10, 0.06, 0.04]))
    base = rng.uniform(0.09, 0.24) if count <= 2 else rng.uniform(0.085, 0.165)
    same_color, same_shape = rng.random() < 0.25, rng.random() < 0.3
    color, shape = int(rng.integers(OTHER + 1)), int(rng.integers(4))
    places: list[tuple[float, float, float]] = []
    kinds: list[tuple[int, int]] = []
    owner = np.full((side, side), -1)
    for _ in range(count):
        if not same_color:
            color = int(rng.integers(OTHER + 1))
        if not same_shape:
            shape = int(rng.choice(5, p=[0.215, 0.215, 0.215, 0.215, 0.14]))
        shade, spacing = _shade(rng, color), rng.uniform(0.85, 1.6)
        for _ in range(30):
            radius = side * np.clip(base * rng.uniform(0.8, 1.25), 0.08, 0.3)
            cx, cy = rng.uniform(radius * 0.8, side - radius * 0.8, 2)
            apart = all(np.hypot(cx - a, cy - b) > spacing * (radius + r) for a, b, r in places)
            if apart and np.linalg.norm(shade - canvas[int(cy), int(cx)]) > 70:
                break
        else:
            continue
        x0, x1 = max(0, int(cx - 1.7 * radius)), min(side, int(cx + 1.7 * radius) + 2)
        y0, y1 = max(0, int(cy - 1.7 * radius)), min(side, int(cy + 1.7 * radius) + 2)
        y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32) + 0.5
        turn = rng.uniform(-0.5, 0.5) if rng.random() < 0.8 else rng.uniform(0, 2 * np.pi)
        u, v = (x - cx) / radius, (y - cy) / radius
        u, v = np.cos(turn) * u + np.sin(turn) * v, np.cos(turn) * v - np.sin(turn) * u
        cover = np.clip(0.5 - _distance(rng, shape, u, v) * radius / rng.uniform(0.6, 1.6), 0, 1)
        fill = shade
        if rng.random() < 0.3:
            fill = fill + _gradient(rng, side) * rng.uniform(-30, 30) + _texture(rng, side, 12) * rng.uniform(0, 10)
            fill = np.clip(fill, 0, 255)[y0:y1, x0:x1]
        window = canvas[y0:y1, x0:x1]
        window += (fill - window) * cover[..., None]
        owner[y0:y1, x0:x1][cover >= 0.5] = len(places)
        places.append((cx, cy, radius))
        kinds.append((shape, color))
    labels = Labelled(canvas, [], [], [])
    for i, ((shape, color), (_, _, radius)) in enumerate(zip(kinds, places, strict=True)):
        if shape < len(SHAPES) and (owner == i).sum() > 0.5 * radius**2:
            labels.classes.append(shape)
            labels.colors.append(color)
            labels.boxes.append(_box(owner == i))
    return labels


def _degrade(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Blur, noise, resampling, JPEG and exposure, each with its probability, in random strength; fp32 in and out."""
    side = image.shape[0]
    if rng.random() < 0.3:
        image = (image - 128) * np.float32(rng.uniform(0.75, 1.15)) + 128 + rng.uniform(-18, 18, 3).astype(np.float32)
    if rng.random() < 0.55:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 2.4))
    if rng.random() < 0.3:
        small = int(side * rng.uniform(0.4, 0.9))
        image = cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA)
        image = image + rng.standard_normal(image.shape, np.float32) * rng.uniform(0, 25)
        image = cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC)
    if rng.random() < 0.45:
        image = image + rng.standard_normal(image.shape, np.float32) * rng.uniform(0, 45)
        image = np.clip(image, *((0, 255) if rng.random() < 0.5 else (20, 235)))
    if rng.random() < 0.3:
        image = image + _texture(rng, side, side // 8) * rng.uniform(2, 12)
    out = np.clip(image, 0, 255).astype(np.uint8)
    if rng.random() < 0.35:
        out = cv2.imdecode(cv2.imencode(".jpg", out, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(15, 80))])[1], 1)
    return out


def draw_labelled(rng: np.random.Generator, side: int) -> Labelled:
    """One random training picture of `side` x `side` pixels with its labels."""
    labels = _paint(rng, _background(rng, side))
    return replace(labels, image=_degrade(rng, labels.image))
