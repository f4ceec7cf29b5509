"""Prompts to draw and score: JSON lines in GenEval's format, or the shapes world's training prompts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.order import permutation

SHAPES_PROMPTS = 2048
"""Prompts of the embedded default, balanced over GenEval's six tags."""


@dataclass(frozen=True)
class Prompt:
    """What a picture is drawn from and scored by."""

    key: str
    """Its place in the file; randomness depends on it."""
    text: str
    metadata: dict[str, Any]
    """The whole line: GenEval's tag, include, exclude; lines of text; whatever the reward wants."""


def read_prompts(path: Path | None) -> list[Prompt]:
    """Prompts of a .jsonl file ({"prompt": ..., ...} a line); without one, those of the shapes world's train split.

    Raises ValueError that names the line which is no prompt.
    """
    if path is None:
        from data_pipeline.synthesis.shapes_world import sample_prompt

        rows = [sample_prompt(np.random.default_rng(i), "train") for i in range(SHAPES_PROMPTS)]
    else:
        rows = [_parse(line, f"{path}, line {n}") for n, line in _lines(path)]
        if not rows:
            raise ValueError(f"{path} holds no prompts")
    return [Prompt(f"prompt-{i:06d}", row["prompt"], row) for i, row in enumerate(rows)]


class PromptStream:
    """`count` prompts at a time, each with its pass over all of them, for ever; every pass in an order of its own."""

    def __init__(self, prompts: list[Prompt], count: int, seed: int):
        self.prompts, self.count, self.seed = prompts, count, seed
        self._cursor = (0, 0)

    def __next__(self) -> list[tuple[Prompt, int]]:
        (epoch, index), places = self._cursor, []
        while len(places) < self.count:
            order = permutation(len(self.prompts), "order", self.seed, epoch)
            taken = order[index : index + self.count - len(places)]
            places += [(self.prompts[i], epoch) for i in taken]
            index += len(taken)
            if index == len(order):
                epoch, index = epoch + 1, 0
        self._cursor = (epoch, index)
        return places

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._cursor[0], "index": self._cursor[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._cursor = (state["epoch"], state["index"])


def _lines(path: Path) -> list[tuple[int, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(n, line) for n, line in enumerate(lines, 1) if line.strip()]


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(f'{where}: expected {{"prompt": "...", ...}}')
    return row
