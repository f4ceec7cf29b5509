"""Every filter that scores one sample by itself, by name."""

from collections.abc import Callable

from data_pipeline.filters import caption, file, picture
from data_pipeline.filters.view import View

FILTERS: dict[str, Callable[[View], float]] = {
    function.__name__: function
    for function in (
        file.broken,
        file.file_size,
        file.resolution,
        file.aspect_ratio,
        file.rotation,
        picture.clarity,
        picture.luma,
        picture.saturation,
        picture.entropy,
        picture.texture,
        caption.invalid_caption,
        caption.caption_words,
    )
}
