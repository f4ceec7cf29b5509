"""Is there anything in a picture besides the objects that were found in it?

A detector names what looks like a shape and is silent about smears, fragments and shapes that it isn't sure of. On a
plain background, which all pictures of the shapes world have, such things still stand out by their colour: this looks
for a region outside the objects' boxes that is not of the background's colour. It can only find something wrong.
"""

import cv2
import numpy as np

from evaluation.scoring import Objects

SIDE = 96
"""Pictures are looked at with this shorter side, in pixels, and blurred by BLUR pixels, so that noise is no region."""
BLUR = 2.0
MARGIN, LEAST_MARGIN = 0.15, 3
"""Boxes are enlarged by this share of their sides at each end, and by at least this many pixels."""
CONTRAST = 25.0
"""Distance from the background, in CIELAB units, from which a pixel is not of its colour."""
AREA = 0.004
"""Least area of a region, as a share of the squared shorter side: a fifth of the smallest shape's."""


def has_leftovers(image: np.ndarray, objects: Objects) -> bool:
    """Whether a uint8 [h, w, 3] picture shows anything outside the boxes of its objects; blind to what is inside."""
    scale = SIDE / min(image.shape[:2])
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    resized = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    soft = cv2.GaussianBlur(resized.astype(np.float32) / 255, (0, 0), BLUR)
    lab = cv2.cvtColor(soft, cv2.COLOR_RGB2LAB)
    free = np.ones(lab.shape[:2], bool)
    for found in (f for group in objects.values() for f in group):
        box = np.array(found.box) * scale
        margin = np.maximum(MARGIN * (box[2:] - box[:2]), LEAST_MARGIN)
        x0, y0 = np.floor(box[:2] - margin).clip(0).astype(int)
        x1, y1 = np.ceil(box[2:] + margin).clip(0).astype(int)
        free[y0:y1, x0:x1] = False
    if not free.any():
        return False
    distance = np.linalg.norm(lab - np.median(lab[free], 0), axis=-1)
    other = (free & (distance > CONTRAST)).astype(np.uint8)
    _, _, regions, _ = cv2.connectedComponentsWithStats(other, connectivity=4)
    return bool((regions[1:, cv2.CC_STAT_AREA] >= AREA * SIDE**2).any())
