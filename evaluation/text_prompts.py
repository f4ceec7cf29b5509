"""Prompts whose pictures are to show text: three benchmarks' files as they are published, and own ones.

folder   CVTG-2K: CVTG/2.json … CVTG-Style/5.json, {"data_list": [{"index", "prompt", "sentence_list"?}]}
.jsonl   LongText-Bench: {"prompt", "text": [...]} a line, Chinese where the text is
.jsonl   ChineseWord: {"character", "level"?, "prompt"?} a line
.jsonl   own: {"prompt", "text", "protocol", "language", "stratum"} a line
"""

import json
import re
from pathlib import Path
from typing import Any

from command_line import UserError
from evaluation.ocr import LANGUAGES, LAYOUT, is_chinese
from evaluation.prompts import Prompt, read_json_lines

DEFAULT = Path(__file__).with_name("text-default.jsonl")


def text_prompts(path: Path | None) -> list[Prompt]:
    """Prompts of a folder or file (formats above), or the embedded ones; UserError says what is wrong with it."""
    if path is None:
        path = DEFAULT
    if path.is_dir():
        return _cvtg(path)
    rows = read_json_lines(path, ())
    return [_prompt(f"{path.stem}/{i:04d}", row, f"{path}, prompt {i + 1}") for i, row in enumerate(rows)]


def _prompt(name: str, row: dict[str, Any], where: str) -> Prompt:
    if "character" in row:
        metadata = {"protocol": "character", "language": "zh", "text": [row["character"]]}
        text = row.get("prompt", f"一张纸上写着汉字“{row['character']}”")
        return Prompt(name, text, f"level {row.get('level', 1)}", metadata)
    if not isinstance(row.get("prompt"), str) or not row.get("text"):
        raise UserError(f'{where}: expected {{"prompt": "...", "text": ["...", ...]}} or {{"character": "..."}}')
    wanted = [row["text"]] if isinstance(row["text"], str) else list(row["text"])
    language = row.get("language", "zh" if any(map(is_chinese, wanted)) else "en")
    protocol = row.get("protocol", "long")
    for what, value, known in (("language", language, LANGUAGES), ("protocol", protocol, LAYOUT)):
        if value not in known:
            raise UserError(f"{where}: {what} {value!r}; known are {', '.join(known)}")
    metadata = {"protocol": protocol, "language": language, "text": wanted}
    return Prompt(name, row["prompt"], row.get("stratum", language), metadata)


def _cvtg(folder: Path) -> list[Prompt]:
    files = [f for style in ("CVTG", "CVTG-Style") for f in sorted((folder / style).glob("[0-9].json"))]
    if not files:
        raise UserError(f"{folder} holds no CVTG/2.json … CVTG-Style/5.json")
    prompts = []
    for file in files:
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))["data_list"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{file}: expected {{"data_list": [...]}} ({error})') from None
        for row in rows:
            texts = row.get("sentence_list") or re.findall(r"['\"‘“]([^'\"’”]+)['\"’”]", row["prompt"])
            if not texts:
                raise UserError(f"{file}, prompt {row['index']}: quotes no text")
            metadata = {"protocol": "words", "language": "en", "text": texts}
            name = f"{file.parent.name}/{file.stem}/{row['index']}"
            prompts.append(Prompt(name, row["prompt"], f"{file.stem} regions", metadata))
    return prompts
