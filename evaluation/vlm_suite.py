"""Pictures judged by a vision-language model: questions answered yes or no, or ratings on a scale.

Questions as in DPG-Bench (arXiv 2403.05135): a yes counts only if all that it presupposes is also answered yes. Ratings
are the numbers in the answer, brought to [0, 1]; GEdit's is sqrt(min of one answer x min of the other), as VIEScore
(arXiv 2312.14867). An answer that can't be read is asked for again; a picture is never left out.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from command_line import UserError
from evaluation.prompts import Prompt
from evaluation.suites import Rows
from vlm.server import ChatServer

READINGS = 3
"""Times that an answer is asked for until it can be read."""
YES_NO = "{question} Answer with one word: yes or no."


class VLMSuite:
    """One of the prompt sets of vlm_prompts.py, judged through a server."""

    primary = "rating"
    bounds = (0.0, 1.0)

    def __init__(self, name: str, prompts: list[Prompt], server: ChatServer):
        self.name, self.prompts, self.server = name, prompts, server
        self.fingerprint = server.fingerprint

    def score(self, images: list[np.ndarray], prompts: list[Prompt]) -> Rows:
        return {"rating": [self._rate(image, p) for image, p in zip(images, prompts, strict=True)]}

    def truth(self, prompt: Prompt, size: tuple[int, int]) -> None:
        return None

    def other(self, prompt: Prompt, size: tuple[int, int]) -> np.ndarray | None:
        """Of an edit, the picture as it was; else the model's own pictures of other prompts serve."""
        sources = self.sources(prompt, size)
        return sources[0] if sources else None

    def sources(self, prompt: Prompt, size: tuple[int, int]) -> list[np.ndarray]:
        from PIL import Image

        path = prompt.metadata.get("image")
        return [] if path is None else [np.array(Image.open(Path(path)).convert("RGB"))]

    def _rate(self, image: np.ndarray, prompt: Prompt) -> float:
        if "questions" in prompt.metadata:
            asked = prompt.metadata["questions"]
            answers = {q["id"]: self._yes(q["text"], image) for q in asked}
            return with_parents(answers, {q["id"]: q["parents"] for q in asked})
        low, high = prompt.metadata["scale"]
        shown = [*self.sources(prompt, image.shape[:2]), image]
        groups = [self._numbers(ask.format(prompt=prompt.text), shown, low, high) for ask in prompt.metadata["ask"]]
        return combine(groups, prompt.metadata["combine"], low, high)

    def _yes(self, question: str, image: np.ndarray) -> bool:
        for _ in range(READINGS):
            answer = self.server.ask(YES_NO.format(question=question), [image])
            if found := re.search(r"\b(yes|no)\b", answer.lower()):
                return found[1] == "yes"
        raise UserError(f"the judge answers neither yes nor no to {question!r}: {answer[:100]!r}")

    def _numbers(self, ask: str, images: list[np.ndarray], low: float, high: float) -> list[float]:
        for _ in range(READINGS):
            answer = self.server.ask(ask, images)
            if numbers := read_numbers(answer, low, high):
                return numbers
        raise UserError(f"the judge gives no number from {low} to {high}: {answer[:100]!r}")


def with_parents(answers: dict[int, bool], parents: dict[int, list[int]]) -> float:
    """Share of questions answered yes whose parents (one step up, as DPG-Bench counts) were answered yes too."""
    held = [yes and all(answers[p] for p in parents[name]) for name, yes in answers.items()]
    return sum(held) / len(held)


def read_numbers(answer: str, low: float, high: float) -> list[float]:
    """Numbers of an answer that lie on the scale; where some stand after a colon or alone on a line, only those."""
    pattern = r"(?:^|:)\s*\**\s*(\d+(?:\.\d+)?)\s*\**\s*(?=$|/|[.,;\n])"
    found = re.findall(pattern, answer, re.MULTILINE) or re.findall(r"(?<![\d./])\d+(?:\.\d+)?", answer)
    return [value for value in map(float, found) if low <= value <= high]


def combine(groups: list[list[float]], how: str, low: float, high: float) -> float:
    """One value in [0, 1] of the ratings in each answer."""
    scaled: list[list[Any]] = [[(v - low) / (high - low) for v in group] for group in groups]
    if how == "geometric mean of minima":
        return math.prod(min(group) for group in scaled) ** (1 / len(scaled))
    return sum(v for group in scaled for v in group) / sum(map(len, scaled))
