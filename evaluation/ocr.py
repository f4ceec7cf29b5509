"""Is the text that a prompt asks for in the picture? Reading and counting, in the protocols of three benchmarks.

    words       CVTG-2K (arXiv 2503.23461): words of several quoted texts; accuracy and similarity word by word
    long        LongText-Bench (arXiv 2507.22058): words (English) or characters (Chinese), in any order
    character   ChineseWord (arXiv 2508.02324, section 5.2.2): one character a picture, right or wrong

Pictures are read by Tesseract; rewards read them with rapidocr, so that a model trained on the one is judged by the
other.
"""

import os
import re
import shutil
import subprocess
from collections import Counter
from typing import Any

import numpy as np

from command_line import UserError
from rewards.ocr import edit_distance

SMALL_SIDES, LARGE_SIDE = (224, 320, 768), 768
"""Shorter sides at which pictures are read: Tesseract wants letters neither too small nor too large."""
LAYOUT = {"character": "10", "words": "11", "long": "6"}
"""Tesseract's page segmentation modes: one character, scattered text, one block."""
LANGUAGES = {"en": "eng", "zh": "chi_sim"}
_CHINESE = re.compile(r"[\u3400-\u9fff]")


def is_chinese(text: str) -> bool:
    """Whether a text has Chinese characters."""
    return _CHINESE.search(text) is not None


def units(text: str, language: str) -> list[str]:
    """What is counted: lower-case words without punctuation, or (zh) letters and characters one by one."""
    cleaned = "".join(c if c.isalnum() else " " if c.isspace() else "" for c in text.lower())
    return cleaned.split() if language == "en" else list("".join(cleaned.split()))


def found_share(read: list[str], wanted: list[str]) -> float:
    """Share of the wanted units that were read, each reading counted once, in any order."""
    return sum((Counter(read) & Counter(wanted)).values()) / len(wanted)


def similarity(read: str, wanted: str) -> float:
    """1 - edit distance / length of the longer one; 1 for two empty texts."""
    return 1 - edit_distance(read, wanted) / max(len(read), len(wanted), 1)


def score_text(read: str, metadata: dict[str, Any]) -> dict[str, float]:
    """{"accuracy", "similarity"} of what was read, for metadata {"protocol", "language", "text": [wanted, ...]}.

    Similarity is that of the whole text, except for `words`: there each wanted word takes the reading most like it.
    """
    language, protocol = metadata["language"], metadata["protocol"]
    wanted, got = units(" ".join(metadata["text"]), language), units(read, language)
    if not wanted:
        raise ValueError(f"no text to look for in {metadata}")
    if protocol == "character":
        return {"accuracy": float(got == wanted), "similarity": similarity("".join(got), "".join(wanted))}
    if protocol == "words":
        like = [max((similarity(g, w) for g in got), default=0.0) for w in wanted]
        return {"accuracy": found_share(got, wanted), "similarity": sum(like) / len(like)}
    joint = " " if language == "en" else ""
    return {"accuracy": found_share(got, wanted), "similarity": similarity(joint.join(got), joint.join(wanted))}


class Tesseract:
    """The judge of text: Tesseract's LSTM engine, called as a program.

    Raises UserError if the program or one of its language models is missing.
    """

    def __init__(self, languages: tuple[str, ...] = ("en", "zh")):
        self.program = shutil.which("tesseract")
        if self.program is None:
            raise UserError("Tesseract is not installed: apt-get install tesseract-ocr tesseract-ocr-chi-sim")
        version, listed = self._call("--version"), self._call("--list-langs").split()
        if missing := sorted({LANGUAGES[code] for code in languages} - set(listed)):
            packages = " ".join(f"tesseract-ocr-{name.replace('_', '-')}" for name in missing)
            raise UserError(f"Tesseract lacks {', '.join(missing)}: apt-get install {packages}")
        self.fingerprint = f"{version.splitlines()[0]}, sides {SMALL_SIDES}"

    def read(self, image: np.ndarray, protocol: str, language: str) -> str:
        """Text of a uint8 [h, w, 3] picture: the most confident of its readings at several sizes."""
        native = min(image.shape[:2])
        sides = SMALL_SIDES if native < LARGE_SIDE else (LARGE_SIDE, native)
        readings = [self._read_at(image, side / native, LAYOUT[protocol], LANGUAGES[language]) for side in sides]
        return max(readings)[1]

    def _read_at(self, image: np.ndarray, scale: float, layout: str, model: str) -> tuple[float, str]:
        """(confidence, text): characters weighted by the engine's confidence in their word above one half."""
        import cv2

        size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
        scaled = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
        png = cv2.imencode(".png", scaled[:, :, ::-1])[1].tobytes()
        table = self._call(
            "stdin", "stdout", "-l", model, "--oem", "1", "--psm", layout, "--dpi", "300", "tsv", data=png
        )
        rows = [row.split("\t") for row in table.splitlines()[1:]]
        words = [(row[11].strip(), float(row[10])) for row in rows if len(row) > 11 and row[11].strip()]
        return sum(len(word) * (confidence - 50) for word, confidence in words), " ".join(word for word, _ in words)

    def _call(self, *arguments: str, data: bytes | None = None) -> str:
        environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
        done = subprocess.run(
            [self.program, *arguments], input=data, capture_output=True, timeout=120, env=environment, check=False
        )
        if done.returncode:
            raise UserError(f"tesseract {' '.join(arguments)} failed: {done.stderr.decode(errors='replace')[-200:]}")
        return done.stdout.decode(errors="replace").strip()
