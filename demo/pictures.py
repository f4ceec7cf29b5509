"""Pictures on a page: grids, crops, data addresses."""

import io

from PIL import Image, ImageOps

from training.curves import png_address


def decode(image: bytes) -> Image.Image:
    """An encoded picture as RGB."""
    return Image.open(io.BytesIO(image)).convert("RGB")


def contact_sheet(pictures: list[Image.Image], columns: int, side: int) -> Image.Image:
    """Pictures on a grid, each fitted into a square of `side` pixels; small ones are enlarged without smoothing."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + 4)), "white")
    for i, picture in enumerate(pictures):
        method = Image.Resampling.NEAREST if max(picture.size) < side else Image.Resampling.LANCZOS
        cell = ImageOps.pad(picture, (side, side), color="white", method=method)
        sheet.paste(cell, (i % columns * (side + 4), i // columns * (side + 4)))
    return sheet


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
