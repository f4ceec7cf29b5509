"""Stage 1, on the file: can it be read, how large is it."""

import io

from data_pipeline.filters.view import View


def broken(view: View) -> float:
    """1 if the picture cannot be decoded to its last row, else 0."""
    try:
        _ = view.image
    except ValueError:
        return 1.0
    return 0.0


def file_size(view: View) -> float:
    """Bytes of the file per pixel of the picture; very few mean that compression destroyed it, or that it is blank."""
    return len(view.sample.image) / (view.image.width * view.image.height)


def resolution(view: View) -> float:
    """The shorter side in pixels."""
    return float(min(view.image.size))


def aspect_ratio(view: View) -> float:
    """The longer side over the shorter."""
    return max(view.image.size) / min(view.image.size)


def rotation(view: View) -> float:
    """Degrees (0, 90 or 180) by which the EXIF orientation turns the picture; mirroring alone is none."""
    from PIL import Image

    orientation = Image.open(io.BytesIO(view.sample.image)).getexif().get(0x0112, 1)
    return {3: 180.0, 4: 180.0, 5: 90.0, 6: 90.0, 7: 90.0, 8: 90.0}.get(orientation, 0.0)
