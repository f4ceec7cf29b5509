"""Encoded files to pixels."""

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.buckets import Box, centre_crop, choose_bucket

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 1 << 28
"""Pictures with more pixels are refused before they are decoded."""


def decode(data: bytes) -> "Image":
    """The picture in `data`, turned as its EXIF orientation says, RGB, transparency on white.

    ValueError says what is wrong: not a picture, truncated, too large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # size and EXIF warnings: sizes are checked here, EXIF is best effort
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"is too large ({image.width} x {image.height})")
            image.load()
            image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError("is not a picture, or its header is damaged") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be decoded: {error}") from None
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((values / (values.max() or 1) * 255).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def fit(image: "Image", res: int) -> tuple[np.ndarray, Box]:
    """Crop and resize a picture into its bucket at `res`: (uint8 [h, w, 3], the box that was kept)."""
    from PIL.Image import Resampling

    bucket = choose_bucket(*image.size, res)
    box = centre_crop(*image.size, bucket)
    return np.asarray(image.resize(bucket, Resampling.LANCZOS, box=box)), box
