"""What is in a picture of the shapes world, by colour segmentation and contours.

The detector knows nothing of how pictures are made: the background is the border's median colour, an object a connected
region that differs from it, its colour the nearest named one in CIELAB, its shape the nearest of a few prototypes of
contour features.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from data_pipeline.synthesis.shapes_world import COLORS, SHAPES

_SIDE = 256
"""Pictures are scaled to this shorter side before detection."""
_CONTRAST = 14.0
"""Distance from the background, in CIELAB units, from which a pixel may belong to an object."""
_MIN_AREA, _MAX_AREA = 0.006, 0.4
"""Smaller regions are specks, larger ones aren't objects; as a share of the squared shorter side."""
_PLAIN = 18.0
"""Mean distance of an object's pixels from its colour, in CIELAB units, above which it stops being one object."""
_PROTOTYPES = (
    ("circle", (0.990, 0.971, 0.788, 0.604)),
    ("square", (0.979, 0.674, 0.967, 0.519)),
    ("triangle", (0.973, 0.456, 0.537, 0.961)),
    ("star", (0.624, 0.479, 0.440, 0.355)),
    ("square", (0.985, 0.730, 0.950, 0.545)),
    ("triangle", (0.980, 0.530, 0.600, 0.930)),
    ("star", (0.730, 0.570, 0.520, 0.420)),
)
"""Mean area / (hull, enclosing circle, rectangle, triangle) over true renders of 64 to 256 px, then of blurred ones."""
_SHAPE_SCALE, _SHAPE_LIMIT = 0.08, 0.28
_COLOR_SCALE, _COLOR_LIMIT = 12.0, 40.0


def _lab(rgb: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


_LAB = _lab(np.array([list(COLORS.values())], np.uint8))[0]


@dataclass(frozen=True)
class Detection:
    """An object found: probabilities over SHAPES and COLORS, and its box [x0, y0, x1, y1] in the picture's pixels."""

    shape_p: np.ndarray
    color_p: np.ndarray
    box: tuple[float, float, float, float]

    @property
    def shape(self) -> str | None:
        """The most likely shape; None if it looks like none."""
        return SHAPES[self.shape_p.argmax()] if self.shape_p.max() >= 0.5 else None

    @property
    def color(self) -> str | None:
        """The most likely colour; None if it looks like none."""
        return list(COLORS)[self.color_p.argmax()] if self.color_p.max() >= 0.5 else None


def _probabilities(distance: np.ndarray, scale: float, limit: float) -> np.ndarray:
    """Softmax of -d^2 / 2 scale^2 with "none of them" as one more class at distance `limit`; it is left out."""
    logit = -0.5 * (np.append(distance, limit) / scale) ** 2
    p = np.exp(logit - logit.max())
    return (p / p.sum())[:-1].astype(np.float32)


def contour_features(contour: np.ndarray) -> np.ndarray:
    """Area of a contour over that of its convex hull, enclosing circle, rectangle and triangle."""
    area = cv2.contourArea(contour)
    hull = cv2.convexHull(contour)
    circle = math.pi * cv2.minEnclosingCircle(hull)[1] ** 2
    width, height = cv2.minAreaRect(hull)[1]
    triangle = cv2.minEnclosingTriangle(hull)[0]
    return area / np.maximum([cv2.contourArea(hull), circle, width * height, triangle], 1.0)


def detect(image: np.ndarray) -> list[Detection]:
    """Objects on a plain background of a uint8 [h, w, 3] picture, largest first."""
    scale = _SIDE / min(image.shape[:2])
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    scaled = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
    lab = _lab(cv2.bilateralFilter(cv2.medianBlur(scaled, 5), 5, 40, 5))
    border = np.concatenate(
        [lab[:3].reshape(-1, 3), lab[-3:].reshape(-1, 3), lab[:, :3].reshape(-1, 3), lab[:, -3:].reshape(-1, 3)]
    )
    contrast = np.linalg.norm(lab - np.median(border, 0), axis=-1)
    bodies = np.zeros(contrast.shape, bool)
    for window, inside in _regions(contrast > _CONTRAST):
        bodies[window] |= inside & (contrast[window] > np.median(contrast[window][_core(inside)]) / 2)
    found = [_describe(lab, window, inside, 1 / scale) for window, inside in _regions(bodies)]
    return sorted(found, key=lambda d: (d.box[0] - d.box[2]) * (d.box[3] - d.box[1]))


def _regions(mask: np.ndarray) -> list[tuple[tuple[slice, slice], np.ndarray]]:
    """Connected regions of a mask that are no specks: (window, mask within the window)."""
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=4)
    windows = [(i, (slice(y, y + h), slice(x, x + w))) for i, (x, y, w, h, _) in enumerate(stats)]
    return [(w, labels[w] == i) for i, w in windows[1:] if stats[i, cv2.CC_STAT_AREA] >= _MIN_AREA * _SIDE**2]


def _core(region: np.ndarray) -> np.ndarray:
    """The region without its edge, if that leaves enough of it."""
    eroded = cv2.erode(region.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=4, borderValue=0) > 0
    return eroded if eroded.sum() > 20 else region


def _describe(lab: np.ndarray, window: tuple[slice, slice], inside: np.ndarray, unit: float) -> Detection:
    contours = cv2.findContours(inside.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    features = contour_features(max(contours, key=cv2.contourArea))
    pixels = lab[window][_core(inside)]
    color = np.median(pixels, 0)
    spread = np.linalg.norm(pixels - color, axis=1).mean()
    plain = math.exp(-max(0.0, spread - _PLAIN) / 5) if inside.sum() < _MAX_AREA * _SIDE**2 else 0.0
    shape_distance = [min(np.linalg.norm(features - p) for name, p in _PROTOTYPES if name == s) for s in SHAPES]
    rows, columns = window
    return Detection(
        plain * _probabilities(np.array(shape_distance), _SHAPE_SCALE, _SHAPE_LIMIT),
        plain * _probabilities(np.linalg.norm(_LAB - color, axis=1), _COLOR_SCALE, _COLOR_LIMIT),
        (columns.start * unit, rows.start * unit, columns.stop * unit, rows.stop * unit),
    )
