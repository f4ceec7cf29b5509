"""Near-duplicates: the same picture again after recompression, resizing, brightening or cutting at its borders.

Two steps on 32 x 32 thumbnails. Candidates are pairs whose low frequencies are close, whole picture or with a strip cut
from either one's borders; integers make that independent of how the products are blocked. A candidate counts if
one picture, shrunk to between .78 and 1 of its width and height, lies somewhere in the other one. Every pair is looked
at, which does for about 100,000 pictures; more need an index for the first step.
"""

import cv2
import numpy as np

from data_pipeline.filters.view import View

SIDE = 32
STRIP = 3
"""Pixels of a thumbnail that are cut off on one side or two for the first step: a tenth of the picture."""
CANDIDATE_DISTANCE = 0.6
"""Of unit vectors of low frequencies; measured: 97 % of cut copies lie below, 1 % of other pictures below .75."""
SAME_CORRELATION = 0.92
"""Measured: copies lie above .94 (periodic textures apart), crops of a photograph that overlap by < 60 % below .91."""
SAME_COLOUR = 40
"""Largest difference of mean colour, in levels of 255."""
BLOCK = 2048


def thumbnail(view: View) -> np.ndarray:
    """uint8 [32, 32, 3], whatever the aspect ratio."""
    return cv2.resize(view.rgb, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def find_duplicates(thumbnails: np.ndarray) -> dict[int, int]:
    """Which of `thumbnails` [N, 32, 32, 3] to drop, and the earlier, kept one that each repeats.

    The order decides: a picture is dropped only for one that is kept, so chains of small changes don't add up.
    """
    dropped: dict[int, int] = {}
    for later, earlier in _candidates(thumbnails):
        kept = (i for i in earlier if i not in dropped)
        if (same := next((i for i in kept if is_same(thumbnails[i], thumbnails[later])), None)) is not None:
            dropped[later] = same
    return dropped


def is_same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether one of two thumbnails shows the other, or most of it."""
    if np.abs(a.mean(axis=(0, 1)) - b.mean(axis=(0, 1))).max() > SAME_COLOUR:
        return False
    a, b = (cv2.GaussianBlur(x, (0, 0), 1.0) for x in (a, b))
    return _lies_in(a, b) or _lies_in(b, a)


def _lies_in(whole: np.ndarray, part: np.ndarray) -> bool:
    sizes = range(SIDE, round(0.78 * SIDE) - 1, -1)
    for size in sorted(((w, h) for w in sizes for h in sizes), key=lambda s: -s[0] * s[1]):
        shrunk = cv2.resize(part, size, interpolation=cv2.INTER_AREA)
        if cv2.matchTemplate(whole, shrunk, cv2.TM_CCOEFF_NORMED).max() >= SAME_CORRELATION:
            return True
    return False


def _candidates(thumbnails: np.ndarray):
    """(index, earlier indices that may show the same), for each index that has any."""
    if not len(thumbnails):
        return
    signatures = np.stack([_signature(t) for t in thumbnails]).astype(np.float32)  # [N, windows, D] of integers
    norms = (signatures**2).sum(axis=2)
    limit = (CANDIDATE_DISTANCE * 127) ** 2
    for start in range(0, len(signatures), BLOCK):
        rows = slice(start, start + BLOCK)
        near = np.zeros((len(signatures[rows]), min(start + BLOCK, len(signatures))), dtype=bool)
        for window in range(signatures.shape[1]):
            for a, b in ((0, window), (window, 0)):
                product = signatures[rows, a] @ signatures[: near.shape[1], b].T  # exact: integers below 2^24
                near |= norms[rows, a, None] + norms[None, : near.shape[1], b] - 2 * product < limit
        for i in range(len(near)):
            if len(earlier := np.flatnonzero(near[i, : start + i])):
                yield start + i, earlier.tolist()


def _signature(thumbnail: np.ndarray) -> np.ndarray:
    """[windows, 51] low frequencies without the mean, as integers of a vector of length 127; window 0 is the whole."""
    return np.stack([_low_frequencies(thumbnail[y : y + h, x : x + w]) for x, y, w, h in _windows()])


def _windows() -> list[tuple[int, int, int, int]]:
    n = SIDE - STRIP
    corners = [(x, y, n, n) for x in (0, STRIP) for y in (0, STRIP)]
    return [(0, 0, SIDE, SIDE), *corners, (STRIP // 2, STRIP // 2, n, n), (STRIP, STRIP, n - STRIP, n - STRIP)]


def _low_frequencies(window: np.ndarray) -> np.ndarray:
    ycc = cv2.cvtColor(cv2.resize(window, (SIDE, SIDE)).astype(np.float32), cv2.COLOR_RGB2YCrCb)
    parts = [cv2.dct(ycc[..., c])[:k, :k].ravel()[1:] for c, k in ((0, 6), (1, 3), (2, 3))]
    vector = np.concatenate(parts)
    return np.rint(127 * vector / max(np.linalg.norm(vector), 1.0)).astype(np.int8)
