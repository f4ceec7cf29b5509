"""The recipes of docs/gpu.md are commands that run, and fit on the cards that they name; so are README's lines."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"\| ([^|]*?) \| `((?:python|torchrun) [^`]*)` \| ([\d.]+) of ([\d.]+)")
RECIPES = [
    (card, command, needed, of)
    for cards, command, needed, of in ROW.findall((ROOT / "docs" / "gpu.md").read_text())
    for card in re.findall(r"\d+x\w+", cards)
]


def test_there_are_recipes_for_every_size_of_card():
    cards = {card for card, *_ in RECIPES}
    assert cards == {"1xRTX3060", "1xRTX4080", "1xRTX4090", "1xRTX3090", "1xL40S", "1xH100", "8xH100", "64xH100"}


@pytest.mark.parametrize("card, command, needed, of", RECIPES, ids=[f"{c}-{i}" for i, (c, *_) in enumerate(RECIPES)])
def test_a_recipe_fits_as_it_is_written(card, command, needed, of, tmp_path):
    for name in ("FOLDER", "DATA", "PROMPTS"):
        (tmp_path / name).mkdir()
        command = re.sub(rf"\b{name}\b", str(tmp_path / name), command)
    words = re.sub(r"^(python|torchrun( --n\S+ \d+)+)", "", command).split()
    said = plan([*words, "--out", str(tmp_path / "run")], card)
    found = re.search(r"memory +([\d.]+) GiB of ([\d.]+)", said)
    assert found.groups() == (needed, of) and "does not fit" not in said, said


def test_a_picture_that_fits_into_no_microbatch_is_refused_in_the_plan(tmp_path):
    words = "posttrain/sft.py --init Qwen/Qwen-Image --size-px 1024 --lora-rank 16 --max-tokens 4096 --dry-run".split()
    command = [sys.executable, *words, "--pictures", str(tmp_path), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and done.stderr.splitlines()[-1].endswith("--max-tokens 4352 or more"), done.stderr


@pytest.mark.parametrize("card, res", [("8xH100", "640"), ("128xH100", "1328")])
def test_the_lines_of_the_readme_run_as_they_are_written(card, res, tmp_path):
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    (line,) = re.findall(rf"(pretrain/stage\.py --res {res} --preset qwen-image [^\n']*)", text)
    words = [str(tmp_path / w.strip("/")) if w.startswith("/") else w for w in line.split()]
    for word in (w for w in words if w.startswith(str(tmp_path))):
        Path(word).mkdir(parents=True)
    assert "does not fit" not in plan(words, card)


def plan(words: list[str], card: str) -> str:
    """What `--dry-run` of a command says for a card."""
    command = [sys.executable, *words, "--dry-run", "--gpu", card]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    return done.stdout
