"""OCR reward: does the picture show the text that the prompt quotes? (Flow-GRPO, arXiv 2505.05470, section 4.2.)

A plain OCR reward is a cliff: where the detector finds no text, a whole group scores 0 and nothing can be learned. Two
things soften it here: text is also looked for where no detector is needed (in the boxes of known lines, and in the
picture as a whole), and a small share of the reward counts characters in any order.
"""

import re
from collections import Counter

import numpy as np
import torch
from torch import Tensor

CHARACTERS_SHARE = 0.1
"""Share of the reward that is paid for the right characters in any order."""
LINE_HEIGHT = 48
"""Height in pixels at which the recogniser reads a line."""
DETECTOR_SIDE = 320
"""Shorter side in pixels at which the detector runs, as long as that enlarges the picture."""


def quoted_text(prompt: str) -> str:
    """All that a prompt quotes ("…", “…”, 「…」), joined by spaces."""
    return " ".join(a or b or c for a, b, c in re.findall(r'"([^"]+)"|“([^”]+)”|「([^」]+)」', prompt))


def normalise(text: str) -> str:
    """Case and white space do not count."""
    return "".join(text.lower().split())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def text_score(read: str, wanted: str) -> tuple[float, float]:
    """(max(1 - edits / length, 0), share of the wanted characters found in any order less the surplus ones)."""
    read, wanted = normalise(read), normalise(wanted)
    exact = max(1 - edit_distance(read, wanted) / len(wanted), 0.0)
    common = sum((Counter(read) & Counter(wanted)).values())
    return exact, 2 * common / (len(read) + len(wanted))


class OCRReward:
    """Reads pictures with rapidocr (its wheel carries English and Chinese models; `pip install .[rewards]`)."""

    def __init__(self):
        import logging

        try:
            from rapidocr import RapidOCR
        except ModuleNotFoundError:
            raise ValueError("the OCR reward needs rapidocr: pip install -e '.[rewards]' -c constraints.txt") from None
        logging.getLogger("RapidOCR").setLevel(logging.ERROR)
        self.engine = RapidOCR(
            params={
                "Global.log_level": "error",
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "Det.limit_side_len": DETECTOR_SIDE,
                "Det.limit_type": "min",
            }
        )

    def __call__(self, images: list[np.ndarray], prompts: list[str], metadata: list[dict]) -> dict[str, Tensor]:
        """{"ocr": [B] in [0, 1]} for uint8 pictures [H, W, 3].

        The wanted text is metadata["lines"] ([{text, box [x0, y0, x1, y1] in pixels, optional}]) or, without them,
        what the prompt quotes; ValueError where there is neither.
        """
        scores = [self._score(*row) for row in zip(images, prompts, metadata, strict=True)]
        return {"ocr": torch.tensor(scores, dtype=torch.float32)}

    def _score(self, image: np.ndarray, prompt: str, metadata: dict) -> float:
        lines = metadata.get("lines") or []
        wanted = " ".join(line["text"] for line in lines) or quoted_text(prompt)
        if not normalise(wanted):
            raise ValueError(f"the OCR reward needs text to look for, but this prompt quotes none: {prompt!r}")
        bgr = np.ascontiguousarray(image[:, :, ::-1])
        readings = [self._read(bgr), self._read_line(bgr)]
        if lines and all("box" in line for line in lines):
            crops = [_crop(bgr, line["box"]) for line in lines]
            readings.append(" ".join(self._read_line(c) for c in crops))
        exact, characters = map(max, zip(*(text_score(r, wanted) for r in readings), strict=True))
        return (1 - CHARACTERS_SHARE) * exact + CHARACTERS_SHARE * characters

    def _read(self, bgr: np.ndarray) -> str:
        """Detect lines, then recognise each, in reading order."""
        result = self.engine(bgr, use_cls=False)
        return " ".join(result.txts or ())

    def _read_line(self, bgr: np.ndarray) -> str:
        """Recognise a picture as one line of text."""
        import cv2

        height, width = bgr.shape[:2]
        line = cv2.resize(bgr, (max(round(width * LINE_HEIGHT / height), 8), LINE_HEIGHT), interpolation=cv2.INTER_AREA)
        result = self.engine(line, use_det=False, use_cls=False, use_rec=True)
        return " ".join(result.txts or ())


def _crop(image: np.ndarray, box: list[float]) -> np.ndarray:
    height, width = image.shape[:2]
    x0, y0, x1, y1 = (round(v) for v in box)
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return image[y0 : max(min(y1, height), y0 + 1), x0 : max(min(x1, width), x0 + 1)]
