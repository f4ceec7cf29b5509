"""Self-contained HTML pages: templates (page.html and others beside this file), grids, pictures as data URIs."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def render(template: str, **values: Any) -> bytes:
    """Fill in a template of this folder; text is escaped."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values).encode()


def contact_sheet(pictures: list[Image.Image], columns: int, side: int) -> Image.Image:
    """Pictures on a grid, each fitted into a square of `side` pixels; small ones are enlarged without smoothing."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + 4)), "white")
    for i, picture in enumerate(pictures):
        method = Image.Resampling.NEAREST if max(picture.size) < side else Image.Resampling.LANCZOS
        cell = ImageOps.pad(picture, (side, side), color="white", method=method)
        sheet.paste(cell, (i % columns * (side + 4), i // columns * (side + 4)))
    return sheet


def picture_uri(picture: Image.Image | np.ndarray, side: int) -> str:
    """A picture, shrunk so that neither side is longer than `side` pixels, as a data URI."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
