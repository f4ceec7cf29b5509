"""Reads synthetic pages with Tesseract, an engine that the data pipeline itself doesn't use.

Needs the program with its models eng, chi_sim and, for vertical text, chi_sim_vert (on Debian: tesseract-ocr,
tesseract-ocr-chi-sim, tesseract-ocr-chi-sim-vert).
"""

import io
import os
import shutil
import subprocess
import unicodedata

import numpy as np
from PIL import Image, ImageOps

from data_pipeline.synthesis.line_breaking import has_chinese
from data_pipeline.synthesis.typesetting import Line

LINE_HEIGHTS = {"chinese": (14, 16, 18, 20), "english": (18, 24, 32), "mixed": (18, 24, 32)}
"""Pixels that a line is scaled to; the reading that Tesseract is surest of counts. Its Chinese model (Debian's) leaves
short words out when they are larger. Chosen on pages of another seed than those that bench/synthesis.py reads."""
COLUMNS, BLOCK, CHARACTER = "5", "6", "10"
"""Tesseract's page segmentation modes."""
_SAME = str.maketrans("‘’“”—–", "''\"\"--")


def model_for(language: str, vertical: bool) -> str:
    """Tesseract's model for a page."""
    if language == "english":
        return "eng"
    return "chi_sim_vert" if vertical else "chi_sim" if language == "chinese" else "chi_sim+eng"


def missing_models(*models: str) -> list[str]:
    """Those of the models that this machine lacks; all of them if there is no Tesseract."""
    program = shutil.which("tesseract")
    listed = subprocess.run([program, "--list-langs"], capture_output=True).stdout.decode().split() if program else []
    return [model for model in models if not set(model.split("+")) <= set(listed)]


def is_common(text: str) -> bool:
    """Whether the Chinese characters of a text are among the 3,755 common ones (GB 2312, level 1)."""
    codes = [char.encode("gb2312", "ignore") for char in text if has_chinese(char)]
    return all(len(code) == 2 and 0xB0 <= code[0] <= 0xD7 for code in codes)


def normalize(text: str, language: str) -> str:
    """Compatibility forms, straight quotes, single spaces (none in Chinese): what reading can't tell apart."""
    text = unicodedata.normalize("NFKC", text).translate(_SAME)
    return (" " if language == "english" else "").join(text.split())


def read(image: np.ndarray, lines: tuple[Line, ...], language: str, vertical: bool = False) -> str:
    """The text that Tesseract sees in a page, uint8 [h, w, 3].

    Of the lines only their typical height is used, and whether there is more than one character.
    """
    across = (0, 2) if vertical else (1, 3)
    height = np.median([line.box[across[1]] - line.box[across[0]] for line in lines])
    gray = ImageOps.autocontrast(Image.fromarray(image).convert("L"))
    if np.median(np.asarray(gray)) < 128:
        gray = ImageOps.invert(gray)
    alone = len(lines) == 1 and len(lines[0].text) == 1
    layout = CHARACTER if alone else COLUMNS if vertical else BLOCK
    model = model_for(language, vertical)
    readings = [_read_at(gray, goal / height, model, layout) for goal in LINE_HEIGHTS[language]]
    return normalize(max(readings)[1], language)


def _read_at(gray: Image.Image, scale: float, model: str, layout: str) -> tuple[float, str]:
    """(confidence, text) at a scale: characters weighted by the confidence in their word above one half."""
    size = (max(1, round(gray.width * scale)), max(1, round(gray.height * scale)))
    page = ImageOps.expand(gray.resize(size, Image.Resampling.LANCZOS), 20, fill=int(np.median(np.asarray(gray))))
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    command = ["tesseract", "-", "-", "-l", model, "--psm", layout, "tsv"]
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    table = subprocess.run(command, input=buffer.getvalue(), capture_output=True, check=True, env=environment).stdout
    rows = [row.split("\t") for row in table.decode().splitlines()[1:]]
    words = [(row[11].strip(), float(row[10])) for row in rows if len(row) > 11 and row[11].strip()]
    return sum(len(word) * (sure - 50) for word, sure in words), " ".join(word for word, _ in words)
