"""Pictures judged by a vision-language model: questions answered yes or no, or ratings on a scale.

Questions as in DPG-Bench (arXiv 2403.05135): a yes counts only if all that it presupposes is also answered yes. Ratings
are brought to [0, 1]; GEdit's is sqrt(min of one answer x min of the other), as VIEScore (arXiv 2312.14867). Answers
are JSON of a given form; one in any other form is asked for again, never guessed at; a picture is never left out.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from command_line import UserError
from evaluation.prompts import Prompt
from evaluation.suites import SHARE, Rows
from vlm.server import ChatServer

READINGS = 3
"""Times that an answer is asked for until it can be read."""
YES_NO = ' Answer with nothing but JSON: {"answer": "yes"} or {"answer": "no"}.'
RATINGS = " Answer with nothing but JSON, each NUMBER from {low} to {high}: {form}"
AGAIN = " (You answered {answer!r}, which isn't that JSON alone. Answer again.)"
T = TypeVar("T")


class VLMSuite:
    """One of the prompt sets of vlm_prompts.py, judged through a server."""

    primary = "rating"
    bounds = {"rating": SHARE}

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
        from data_pipeline.pictures import decode

        path = prompt.metadata.get("image")
        return [] if path is None else [np.array(decode(Path(path).read_bytes()))]

    def constants(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        return {}

    def _rate(self, image: np.ndarray, prompt: Prompt) -> float:
        if "questions" in prompt.metadata:
            asked = prompt.metadata["questions"]
            answers = {q["id"]: self._yes(q["text"], image) for q in asked}
            return with_parents(answers, {q["id"]: q["parents"] for q in asked})
        low, high = prompt.metadata["scale"]
        shown = [*self.sources(prompt, image.shape[:2]), image]
        groups = []
        for ask in prompt.metadata["ask"]:
            form = "{" + ", ".join(f'"{name}": NUMBER' for name in ask["ratings"]) + "}"
            question = ask["text"].format(prompt=prompt.text) + RATINGS.format(low=low, high=high, form=form)
            read = partial(read_ratings, names=ask["ratings"], low=low, high=high)
            groups.append(self._ask(question, shown, read))
        return combine(groups, prompt.metadata["combine"], low, high)

    def _yes(self, question: str, image: np.ndarray) -> bool:
        return self._ask(question + YES_NO, [image], read_yes)

    def _ask(self, question: str, images: list[np.ndarray], read: Callable[[str], T | None]) -> T:
        """The answer, read; asked for again with a complaint, since the same question gets the same answer."""
        complaint = ""
        for _ in range(READINGS):
            answer = self.server.ask(question + complaint, images)
            if (found := read(answer)) is not None:
                return found
            complaint = AGAIN.format(answer=answer[:100])
        raise UserError(f"the judge doesn't answer {question[:200]!r} in the form asked for: {answer[:100]!r}")


def with_parents(answers: dict[int, bool], parents: dict[int, list[int]]) -> float:
    """Share of questions answered yes whose parents (one step up, as DPG-Bench counts) were answered yes too."""
    held = [yes and all(answers[p] for p in parents[name]) for name, yes in answers.items()]
    return sum(held) / len(held)


def read_yes(answer: str) -> bool | None:
    """Whether an answer is {"answer": "yes"} or {"answer": "no"}; None for anything else."""
    said = read_json(answer)
    return {'{"answer": "yes"}': True, '{"answer": "no"}': False}.get(json.dumps(said))


def read_ratings(answer: str, names: Sequence[str], low: float, high: float) -> list[float] | None:
    """The ratings of an answer {name: number from low to high, ...}, by name; None for anything else."""
    said = read_json(answer)
    numbers = [said.get(name) for name in names]
    right = all(type(v) in (int, float) and low <= v <= high for v in numbers)
    return [float(v) for v in numbers] if right and set(said) == set(names) else None


def read_json(answer: str) -> dict[str, Any]:
    """The one JSON object that an answer is, alone or in a fence; {} for anything else."""
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", answer.strip(), re.DOTALL)
    try:
        found = json.loads(fenced[1] if fenced else answer, object_pairs_hook=_no_name_twice)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name comes twice")
    return dict(pairs)


def combine(groups: list[list[float]], how: str, low: float, high: float) -> float:
    """One value in [0, 1] of the ratings in each answer."""
    scaled: list[list[Any]] = [[(v - low) / (high - low) for v in group] for group in groups]
    if how == "geometric mean of minima":
        return math.prod(min(group) for group in scaled) ** (1 / len(scaled))
    return sum(v for group in scaled for v in group) / sum(map(len, scaled))
