"""Pictures on a page: below each other, as data addresses."""

import io

from PIL import Image

from training.curves import png_address


def stack(sheets: list[Image.Image]) -> Image.Image:
    """Sheets below each other."""
    page = Image.new("RGB", (max(s.width for s in sheets), sum(s.height + 12 for s in sheets)), "white")
    top = 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height + 12
    return page


def data_uri(picture: Image.Image | bytes) -> str:
    """A picture, or the bytes of a PNG, as a data: address, so that the page is one file."""
    if not isinstance(picture, bytes):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        picture = buffer.getvalue()
    return png_address(picture)
