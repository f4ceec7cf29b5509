"""The class of a sample, as its record tells: how much text its picture shows, whether it was drawn, its domain.

The index of a data set holds them (`data_pipeline.sample_index`), so that a stage can draw classes in shares.
"""

from typing import Any
from unicodedata import east_asian_width

from data_pipeline.stages import SYNTHETIC

TEXT = ("none", "words", "sentences", "paragraphs")
"""Kinds of text in a picture (Qwen-Image report, section 3.3: from none to words, sentences and paragraphs)."""
MOST_COLUMNS = {"words": 24, "sentences": 160}
"""The longest text of a kind; a Chinese character takes two columns. The numbers are ours."""
SOURCE = ("real", "synthetic")
DRAWN = frozenset((*SYNTHETIC, "scene", "layout", "edit"))
"""Sources whose pictures `data_pipeline/synthesize.py` draws."""
UNKNOWN = "unknown"
"""The domain of a sample that was not annotated."""


def text_kind(meta: dict[str, Any]) -> str:
    """Kind of text by what the record's "lines" hold; "none" where it tells of none."""
    lines = meta.get("lines")
    texts = [line.get("text") for line in lines if isinstance(line, dict)] if isinstance(lines, list) else []
    text = "".join(t for t in texts if isinstance(t, str))
    columns = sum(2 if east_asian_width(c) in "WF" else 1 for c in text if not c.isspace())
    if not columns:
        return "none"
    return next((kind for kind, most in MOST_COLUMNS.items() if columns <= most), "paragraphs")


def kind_code(meta: dict[str, Any]) -> int:
    """Text and source of a sample in a number below 8; `TEXT[code % 4]` and `SOURCE[code // 4]` give them back."""
    drawn = isinstance(source := meta.get("source"), str) and source in DRAWN
    return TEXT.index(text_kind(meta)) + len(TEXT) * drawn


def domain(meta: dict[str, Any]) -> str:
    """The domain that annotation gave a sample."""
    found = meta.get("domain")
    return found if isinstance(found, str) else UNKNOWN
