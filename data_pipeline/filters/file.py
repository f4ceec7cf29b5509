"""Stage 1, on the file: can it be read, how large is it."""

import io

from data_pipeline.filters.description import sample_filter
from data_pipeline.filters.view import View


@sample_filter(keeps="at most", title="cannot be decoded to its last row")
def broken(view: View) -> float:
    """1 if the picture cannot be decoded to its last row, else 0."""
    try:
        _ = view.image
    except ValueError:
        return 1.0
    return 0.0


@sample_filter(keeps="at least", title="bytes per pixel")
def file_size(view: View) -> float:
    """Bytes of the file per pixel of the picture; very few mean that compression destroyed it, or that it is blank."""
    return len(view.sample.image) / (view.image.width * view.image.height)


@sample_filter(keeps="at least", title="shorter side in pixels")
def resolution(view: View) -> float:
    """The shorter side in pixels."""
    return float(min(view.image.size))


@sample_filter(keeps="at most", title="longer side over the shorter")
def aspect_ratio(view: View) -> float:
    """The longer side over the shorter."""
    return max(view.image.size) / min(view.image.size)


@sample_filter(keeps="at most", title="degrees that the EXIF orientation turns it by")
def rotation(view: View) -> float:
    """Degrees (0, 90 or 180) by which the EXIF orientation turns the picture; mirroring alone is none."""
    from PIL import Image

    orientation = Image.open(io.BytesIO(view.sample.image)).getexif().get(0x0112, 1)
    return {3: 180.0, 4: 180.0, 5: 90.0, 6: 90.0, 7: 90.0, 8: 90.0}.get(orientation, 0.0)
