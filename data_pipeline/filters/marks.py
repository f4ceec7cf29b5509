"""Stage 5, on abnormal elements: machine-readable codes, and frames around the picture."""

import cv2
import numpy as np

from data_pipeline.filters.description import sample_filter
from data_pipeline.filters.view import View


@sample_filter(keeps="at most", title="shows a QR code")
def qr_code(view: View) -> float:
    """1 if OpenCV finds a QR code, else 0."""
    found, _ = cv2.QRCodeDetectorAruco().detect(view.gray)
    return float(found)


@sample_filter(keeps="at most", title="shows a bar code")
def barcode(view: View) -> float:
    """1 if OpenCV finds a bar code (EAN-8, EAN-13, UPC-A, UPC-E), else 0; enlarged, so that thin bars count."""
    enlarged = cv2.resize(view.gray, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    found, _ = cv2.barcode.BarcodeDetector().detectMulti(enlarged)
    return float(found)


@sample_filter(keeps="at most", title="share taken up by plain borders")
def frame(view: View) -> float:
    """Share of the height or width taken up by plain strips along opposite borders (letterboxes, frames)."""
    gray = view.gray.astype(np.int16)
    return max(_plain_ends(gray), _plain_ends(gray.T))


def _plain_ends(gray: np.ndarray) -> float:
    """Plain rows at the top or the bottom, whichever are fewer, times two, as a share."""
    plain = np.percentile(gray, 98, axis=1) - np.percentile(gray, 2, axis=1) <= 6
    top, bottom = (int(np.argmin(rows)) if not rows.all() else len(rows) for rows in (plain, plain[::-1]))
    return 2 * min(top, bottom) / len(plain)
