"""Stage 2, on the pixels: is the picture sharp, well exposed, natural in colour, neither empty nor noise."""

import cv2
import numpy as np

from data_pipeline.filters.description import sample_filter
from data_pipeline.filters.view import View, level_shares


@sample_filter(keeps="at least", title="sharpness")
def clarity(view: View) -> float:
    """Sharpness in [0, 1]: what a 9-pixel box blur takes from the differences between neighbours, as a share.

    A picture that is blurred already loses little (Crete et al., The Blur Effect, 2007). The worse direction counts,
    so that motion blur shows.
    """
    down = _lost_by_blur(view.gray, (1, 9), np.s_[1:], np.s_[:-1])
    across = _lost_by_blur(view.gray, (9, 1), np.s_[:, 1:], np.s_[:, :-1])
    return min(down, across)


def _lost_by_blur(gray: np.ndarray, size: tuple[int, int], here, there) -> float:
    blurred = cv2.blur(gray, size)
    before, after = cv2.absdiff(gray[here], gray[there]), cv2.absdiff(blurred[here], blurred[there])
    return cv2.norm(cv2.subtract(before, after), cv2.NORM_L1) / max(cv2.norm(before, cv2.NORM_L1), 1.0)


@sample_filter(keeps="between", title="brightness")
def luma(view: View) -> float:
    """Brightness in [0, 1]: the middle between the 5th and the 95th percentile of luma."""
    low, high = np.searchsorted(view.histogram.cumsum(), (0.05, 0.95))
    return float(low + high) / 510


@sample_filter(keeps="at most", title="share of fully saturated pixels")
def saturation(view: View) -> float:
    """Share of pixels whose colour is as saturated as can be (HSV saturation above .95, value above .25)."""
    vivid = cv2.inRange(cv2.cvtColor(view.rgb, cv2.COLOR_RGB2HSV), (0, 243, 65), (255, 255, 255))
    return cv2.countNonZero(vivid) / vivid.size


@sample_filter(keeps="at least", title="bits of grey differences between neighbours")
def entropy(view: View) -> float:
    """Shannon entropy, in bits, of grey differences between horizontal neighbours: little in blanks and gradients."""
    share = level_shares(cv2.absdiff(view.gray[:, 1:], view.gray[:, :-1]))
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


@sample_filter(keeps="at most", title="noise in grey levels")
def texture(view: View) -> float:
    """Noise level in grey levels by Immerkaer (1996): much in noise and in patterns without meaning."""
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float32)
    response = cv2.filter2D(view.gray, cv2.CV_32F, kernel)
    return (np.pi / 2) ** 0.5 / 6 * cv2.norm(response, cv2.NORM_L1) / response.size
