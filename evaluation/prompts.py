"""Prompts to evaluate with, frozen in files beside this one or read from the user's."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_line import UserError

SHAPES_SHA256 = {
    "validation": "c23df3c7ad1f894daef0ac4112718467df2937a6a759f9954f31ade936143c81",
    "test-iid": "47372c57078d25b2baea24b8a2a823a2fdfb9a538d3ccaa87e7fdad73ff05abe",
    "test-compositional": "7b7e84af1dbc9038ab0c9d20e4dcb8d15741de3a097e287f2593823847642a7f",
}


@dataclass(frozen=True)
class Prompt:
    """What a picture is drawn from and judged by."""

    id: str
    """Unique in its set."""
    text: str
    stratum: str
    """Its kind (GenEval's tag, a language, a level); a score is the mean over kinds."""
    metadata: dict[str, Any]
    """What the judge needs to know."""


def shapes_prompts(split: str) -> list[Prompt]:
    """The frozen prompts of a split of the shapes world, kinds in turn, so that any beginning is balanced.

    Raises ValueError if the file is not the frozen one.
    """
    path = Path(__file__).with_name(f"shapes-{split}.jsonl")
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != SHAPES_SHA256[split]:
        raise ValueError(f"{path} is not the frozen split: its hash is {found[:16]}…, not {SHAPES_SHA256[split][:16]}…")
    return geneval_prompts(path)


def geneval_prompts(path: Path) -> list[Prompt]:
    """Prompts in GenEval's format, {"tag", "prompt", "include", "exclude"} a line."""
    rows = read_json_lines(path, ("tag", "prompt", "include"))
    return [Prompt(f"{path.stem}/{i:04d}", row["prompt"], row["tag"], row) for i, row in enumerate(rows)]


def read_json_lines(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; UserError names the line that isn't one or lacks one of `keys`."""
    if not path.is_file():
        raise UserError(f"no prompts at {path}")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict) or (missing := [k for k in keys if k not in row]):
            raise UserError(f"{path}, line {number}: no {', '.join(missing if isinstance(row, dict) else keys)}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no prompts")
    return rows
