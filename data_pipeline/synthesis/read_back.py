"""Reads synthetic pages with Tesseract, an engine that the data pipeline itself doesn't use.

Needs the program with its models eng, chi_sim and, for vertical text, chi_sim_vert (on Debian: tesseract-ocr,
tesseract-ocr-chi-sim, tesseract-ocr-chi-sim-vert).
"""

import os
import shutil
import subprocess
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data_pipeline.synthesis.line_breaking import has_chinese
from data_pipeline.synthesis.typesetting import Line

LINE_HEIGHTS = (12, 14, 16, 18, 20, 24, 28, 32)
"""Pixels that a line is scaled to. Tesseract misreads or leaves out other words at each size; the reading it is surest
of counts. Chosen on pages of other seeds than bench/synthesis.py reads."""
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
    readings = _read_at(gray, [goal / height for goal in LINE_HEIGHTS], model_for(language, vertical), layout)
    return normalize(max(readings)[1], language)


def _read_at(gray: Image.Image, scales: list[float], model: str, layout: str) -> list[tuple[float, str]]:
    """(confidence, text) at each scale, by one process; characters weighted by their word's confidence above .5."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i, scale in enumerate(scales):
            size = (max(1, round(gray.width * scale)), max(1, round(gray.height * scale)))
            ground = int(np.median(np.asarray(gray)))
            page = ImageOps.expand(gray.resize(size, Image.Resampling.LANCZOS), 20, fill=ground)
            files.append(Path(folder) / f"{i}.png")
            page.save(files[-1])
        listed = Path(folder) / "pages.txt"
        listed.write_text("".join(f"{file}\n" for file in files))
        command = ["tesseract", listed, "-", "-l", model, "--psm", layout, "tsv"]
        environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
        table = subprocess.run(command, capture_output=True, check=True, env=environment).stdout
    words: list[list[tuple[str, float]]] = [[] for _ in scales]
    for row in (line.split("\t") for line in table.decode().splitlines()):
        if len(row) > 11 and row[1].isdigit() and row[11].strip():
            words[int(row[1]) - 1].append((row[11].strip(), float(row[10])))
    return [(sum(len(w) * (sure - 50) for w, sure in page), " ".join(w for w, _ in page)) for page in words]
