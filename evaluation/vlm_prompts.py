"""Prompt sets that a vision-language model judges, read from the files that their authors publish.

    dpg        FOLDER/dpg_bench.csv: yes-no questions, some of which presuppose others
    oneig      FOLDER/OneIG-Bench.csv, FOLDER/Q_D/{anime,human,object}.json: the same
    drawbench  FILE.csv with Prompts, Category: one rating
    imgedit    FOLDER/basic_edit.json, FOLDER/prompts.json (what to ask by edit type), pictures beside them: ratings
    gedit      FILE.jsonl {"key", "task_type", "instruction", "input_image"}, pictures beside it: two ratings

A question set becomes metadata {"questions": [{"id", "text", "parents"}]}, a rating {"ask": [{"text", "ratings":
[name, ...]}], "scale": [low, high], "combine"}, an edit also {"image": path}.
"""

import csv
import json
from pathlib import Path
from typing import Any

from command_line import UserError
from evaluation.prompts import Prompt, read_json_lines

ONEIG_CATEGORIES = {"anime": "Anime_Stylization", "human": "Portrait", "object": "General_Object"}

ALIGNMENT = (
    'A picture was made for the prompt "{prompt}". How well does it show what the prompt asks for: every object, their '
    "numbers, attributes, relations, and any text? Rate the alignment from 1 (not at all) to 5 (entirely)."
)
EDIT_SUCCESS = (
    'The second picture is the first one edited by the instruction "{prompt}". Rate from 0 to 10 the success (how far '
    "is the instruction carried out?) and the preservation (how far is everything else left as it was?)."
)
EDIT_QUALITY = (
    "Look at the second picture alone. Rate from 0 to 10 its naturalness (light, perspective, composition) and its "
    "cleanness (how free is it of artifacts: blur, distortion, seams?)."
)
IMGEDIT_RATINGS = ["first", "second", "third"]
"""ImgEdit's own words ask for three ratings, whose names depend on the kind of edit."""
IMGEDIT_ORDER = " Give the three ratings in the order in which they were described, and no reasoning."


def vlm_prompts(kind: str, path: Path | None) -> list[Prompt]:
    """Prompts of a set; UserError for files that are missing or in another format."""
    if path is None:
        raise UserError(f"the {kind} prompts are read from their authors' files: give --prompts PATH")
    readers = {"dpg": _dpg, "oneig": _oneig, "drawbench": _drawbench, "imgedit": _imgedit, "gedit": _gedit}
    try:
        prompts = readers[kind](path)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is not in the format of {kind} ({type(error).__name__}: {error})") from None
    if not prompts:
        raise UserError(f"{path} holds no prompts of {kind}")
    return prompts


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        raise UserError(f"no file {file}")
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines))


def _json(file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"no file {file}")
    return json.loads(file.read_text(encoding="utf-8"))


def _dpg(folder: Path) -> list[Prompt]:
    texts: dict[str, str] = {}
    questions: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(folder / "dpg_bench.csv"):
        parents = [int(p) for p in row["dependency"].split(",") if int(p)]
        question = {"id": int(row["proposition_id"]), "text": row["question_natural_language"], "parents": parents}
        texts[row["item_id"]] = row["text"]
        questions.setdefault(row["item_id"], []).append(question)
    return [Prompt(f"dpg/{name}", texts[name], "dpg", {"questions": q}) for name, q in questions.items()]


def _oneig(folder: Path) -> list[Prompt]:
    texts = {(row["category"], row["id"]): row["prompt_en"] for row in _rows(folder / "OneIG-Bench.csv")}
    prompts = []
    for stem, category in ONEIG_CATEGORIES.items():
        for number, item in sorted(_json(folder / "Q_D" / f"{stem}.json").items()):
            asked, needs = (json.loads(v) if isinstance(v, str) else v for v in (item["question"], item["dependency"]))
            questions = [
                {"id": int(k), "text": text, "parents": [int(p) for p in needs.get(k, ()) if int(p)]}
                for k, text in asked.items()
            ]
            text = texts[category, number]
            prompts.append(Prompt(f"oneig/{stem}/{number}", text, stem, {"questions": questions}))
    return prompts


def _drawbench(file: Path) -> list[Prompt]:
    return [
        Prompt(f"drawbench/{i:03d}", row["Prompts"], row["Category"], _rating(1, 5, (ALIGNMENT, ["alignment"])))
        for i, row in enumerate(_rows(file))
    ]


def _imgedit(folder: Path) -> list[Prompt]:
    asks = _json(folder / "prompts.json")
    prompts = []
    for key, item in _json(folder / "basic_edit.json").items():
        ask = asks[item["edit_type"]].replace("{", "{{").replace("}", "}}").replace("<edit_prompt>", "{prompt}")
        metadata = {
            **_rating(1, 5, (ask + IMGEDIT_ORDER, IMGEDIT_RATINGS)),
            "image": str(_picture(folder / item["id"])),
        }
        prompts.append(Prompt(f"imgedit/{key}", item["prompt"], item["edit_type"], metadata))
    return prompts


def _gedit(file: Path) -> list[Prompt]:
    prompts = []
    for row in read_json_lines(file, ("key", "task_type", "instruction", "input_image")):
        metadata = {
            **_rating(0, 10, (EDIT_SUCCESS, ["success", "preservation"]), (EDIT_QUALITY, ["naturalness", "cleanness"])),
            "image": str(_picture(file.parent / row["input_image"])),
        }
        metadata["combine"] = "geometric mean of minima"
        prompts.append(Prompt(f"gedit/{row['key']}", row["instruction"], row["task_type"], metadata))
    return prompts


def _rating(low: int, high: int, *asks: tuple[str, list[str]]) -> dict[str, Any]:
    ask = [{"text": text, "ratings": names} for text, names in asks]
    return {"ask": ask, "scale": [low, high], "combine": "mean"}


def _picture(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"no picture {path}")
    return path
