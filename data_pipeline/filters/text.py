"""Stages 4 and 5, on the text in the picture as OCR reads it: its language, amount and size; is it a watermark."""

import re
import unicodedata
from collections import Counter

from data_pipeline.filters.description import label, sample_filter
from data_pipeline.filters.view import View

_OWNER = re.compile(
    r"shutter\s*stock|getty\s*images|istock|alamy|dreamstime|depositphotos|adobe\s*stock|123rf|\bvcg\b|视觉中国|图虫|千库|摄图"
    r"|©|\(c\)\s*\d{4}|copyright|all rights reserved|版权所有|watermark|\bsample\b|\bpreview\b|水印|样图"
    r"|\bwww\.|\.com\b|@[a-z0-9_]{3,}",
    re.IGNORECASE,
)
_AGENCIES = ("shutterstock", "gettyimages", "dreamstime", "depositphotos", "adobestock")
"""Names long enough to be known with one letter misread."""
_COPYRIGHT_LINE = re.compile(r"\W*(19|20)\d\d\s*[A-Z]\.\s*[A-Z][a-z]+\W*")
"""A year and a name: what OCR leaves of "© 2019 M. Jones"."""


@label(needs="ocr")
def text_language(view: View) -> str:
    """Label: english, chinese, other or none. A tenth of Han characters makes a picture's text Chinese."""
    letters = [unicodedata.name(c, "") for line in view.lines for c in line.text if c.isalpha()]
    if not letters:
        return "other" if view.lines else "none"
    if sum(name.startswith("CJK") for name in letters) >= 0.1 * len(letters):
        return "chinese"
    return "english" if sum(name.startswith("LATIN") for name in letters) > 0.5 * len(letters) else "other"


@sample_filter(keeps="at most", title="share covered by text", needs="ocr")
def text_area(view: View) -> float:
    """Share of the picture that lines of text cover."""
    height, width, _ = view.rgb.shape
    return min(1.0, sum(line.length * line.thickness for line in view.lines) / (height * width))


@sample_filter(keeps="at least", title="pixels of the smallest characters", needs="ocr")
def smallest_character(view: View) -> float | None:
    """Size in pixels of the smallest line's characters; None without text. Type below 7 px often goes unread."""
    return min((line.character_size for line in view.lines), default=None)


@sample_filter(keeps="at most", title="names an owner", needs="ocr")
def watermark(view: View) -> float:
    """1 if a line names an owner or an agency, or is a year and a name, or the same line comes three times; else 0."""
    texts = [re.sub(r"\W+", "", line.text).lower() for line in view.lines]
    repeated = max(Counter(t for t in texts if len(t) > 3).values(), default=0) >= 3
    return float(repeated or any(_is_owner(line.text.strip()) for line in view.lines))


def _is_owner(text: str) -> bool:
    letters = re.sub(r"[\W_]+", "", text).lower()
    misread = any(
        sum(a != b for a, b in zip(name, letters[i:], strict=False)) <= 1
        for name in _AGENCIES
        for i in range(len(letters) - len(name) + 1)
    )
    return misread or bool(_OWNER.search(text) or _COPYRIGHT_LINE.fullmatch(text))
