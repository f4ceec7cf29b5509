"""Every filter and label that looks at one sample by itself, by name."""

from collections.abc import Callable

from data_pipeline.filters import caption, file, marks, models, picture, record, text
from data_pipeline.filters.view import View

FILTERS: dict[str, Callable[[View], float | None]] = {
    function.__name__: function
    for function in (
        file.broken, file.file_size, file.resolution, file.aspect_ratio, file.rotation,
        picture.clarity, picture.luma, picture.saturation, picture.entropy, picture.texture,
        caption.invalid_caption, caption.caption_words, caption.token_length,
        text.text_area, text.smallest_character, text.watermark,
        marks.qr_code, marks.barcode, marks.frame, record.abnormal_elements,
        models.nsfw, models.clip, models.siglip, models.aesthetics,
    )
}  # fmt: skip
"""A score; None where there is nothing to score, which every rule keeps."""

LABELS: dict[str, Callable[[View], str]] = {
    function.__name__: function
    for function in (record.caption_split, record.domain, record.category, text.text_language)
}
"""What splits the data without dropping any of it."""

SET_FILTERS = ("duplicate", "domain_excess", "category_rank")
"""Filters that look at all samples that the others keep, in the order of a recipe's rules."""

NEEDS = {
    "token_length": "tokenizer",
    "text_area": "ocr",
    "smallest_character": "ocr",
    "watermark": "ocr",
    "text_language": "ocr",
    "nsfw": "nsfw",
    "clip": "clip",
    "siglip": "siglip",
    "aesthetics": "aesthetics",
}
"""Which tool a filter or label needs (see `Tools.missing`)."""
