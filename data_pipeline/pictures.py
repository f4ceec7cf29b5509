"""Encoded files to pixels."""

import functools
import io
import warnings
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.buckets import Box, centre_crop, choose_bucket

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageCms import ImageCmsTransform

MAX_PIXELS = 1 << 28
"""Pictures with more pixels are refused before they are decoded."""


def decode(data: bytes) -> "Image":
    """The picture in `data`, turned as its EXIF orientation says, in sRGB by its ICC profile, transparency on white.

    Pixels of 16 bits are scaled by 65,535 and floats by 1, whatever the picture's brightest. ValueError says what is
    wrong: not a picture, truncated, too large, floats beyond 1.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # size and EXIF warnings: sizes are checked here, EXIF is best effort
            Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow refuses twice that
            image = Image.open(io.BytesIO(data))
            size = image.size
            if size[0] * size[1] <= MAX_PIXELS:
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
    except UnidentifiedImageError:
        raise ValueError("is not a picture, or its header is damaged") from None
    except Exception as error:  # noqa: BLE001 - Pillow lets anything out of a damaged file: struct.error, KeyError ...
        raise ValueError(f"cannot be decoded: {error}") from None
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"is too large ({size[0]} x {size[1]})")
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = _to_srgb(image.convert("RGB"), profile)
        image.putalpha(alpha)
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return _to_srgb(image, profile)


def _to_8_bits(image: "Image") -> "Image":
    from PIL import Image

    values = np.asarray(image, dtype=np.float64)
    white = 1.0 if image.mode == "F" else 65535.0 if values.max() <= 65535 else 2.0**31 - 1
    if not (np.isfinite(values).all() and values.max() <= white):
        raise ValueError("has floating-point pixels beyond 1, so its white is not known; save it with 8 or 16 bits")
    return Image.fromarray((values / white * 255).clip(0, 255).round().astype(np.uint8))


def _to_srgb(image: "Image", profile: bytes | None) -> "Image":
    """RGB by an ICC profile; one that is broken, or of other channels than the picture's, is passed over."""
    from PIL import ImageCms

    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    transform = _transform(profile, image.mode) if profile else None
    if transform is not None:
        found = ImageCms.applyTransform(image, transform)
    else:
        found = image if image.mode == "RGB" else image.convert("RGB")
    found.info.pop("icc_profile", None)  # or saving it would say what it isn't any more
    return found


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> "ImageCmsTransform | None":
    """From `profile` to sRGB; None for one that can't be used, or that is sRGB but for rounding."""
    from PIL import Image, ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        found = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "CMYK":
        return found
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3) if mode == "RGB" else levels[None]
    probe = Image.fromarray(grid)
    moved = np.abs(np.asarray(ImageCms.applyTransform(probe, found), int) - np.asarray(probe.convert("RGB"), int))
    return found if moved.max() > 2 else None


def fit(image: "Image", res: int) -> tuple[np.ndarray, Box]:
    """Crop and resize a picture into its bucket at `res`: (uint8 [h, w, 3], the box that was kept)."""
    from PIL.Image import Resampling

    bucket = choose_bucket(*image.size, res)
    box = centre_crop(*image.size, bucket)
    return np.asarray(image.resize(bucket, Resampling.LANCZOS, box=box)), box
