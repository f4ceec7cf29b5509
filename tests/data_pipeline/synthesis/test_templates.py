from pathlib import Path

import numpy as np
import pytest

from data_pipeline.synthesis.corpus import read_corpus
from data_pipeline.synthesis.templates import EMBEDDED, draw_fields, read_templates

TEMPLATE = """
ratios = ["1:1"]
[[palette]]
ground = "#ffffff"
ink = "#000000"
[faces]
body = ["serif"]
[[element]]
kind = "text"
box = [0.1, 0.1, 0.9, 0.9]
text = "{word}"
[english]
captions = ['"{word}"']
[english.fields]
word = ["tea"]
"""


def write(folder: Path, text: str) -> Path:
    (folder / "mine.toml").write_text(text, encoding="utf-8")
    return folder


def test_a_user_writes_a_template(tmp_path: Path) -> None:
    (template,) = read_templates(write(tmp_path, TEMPLATE))
    assert template.name == "mine" and template.elements[0].align == "left"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "text"', 'kind = "txt"', "element 1: unknown kind 'txt'"),
        ("[0.1, 0.1, 0.9, 0.9]", "[0.9, 0.1, 0.1, 0.9]", "element 1: its box must be"),
        ('text = "{word}"', 'text = "{wort}"', r"\[english\] has no field 'wort'"),
        ('text = "{word}"', 'text = "{word}"\nsiez = 0.1', "siez"),
        ('text = "{word}"', 'text = "{word}"\ncolor = "gold"', "a palette lacks the colour 'gold'"),
        ('ratios = ["1:1"]', "", "'ratios' is missing"),
        ("[faces]", "[faces", "mine.toml"),
    ],
)
def test_mistakes_are_named_with_the_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_templates(write(tmp_path, TEMPLATE.replace(old, new)))
    assert "mine.toml" in str(error.value)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no .toml templates"):
        read_templates(tmp_path)


def test_totals_of_receipts_add_up_and_items_differ() -> None:
    receipt = next(t for t in read_templates(EMBEDDED) if t.name == "receipt")
    corpus = read_corpus()
    for seed in range(30):
        for wording in receipt.wordings.values():
            values = draw_fields(np.random.default_rng(seed), wording, corpus)
            prices = [round(100 * float(values[f"price{i}"])) for i in (1, 2, 3)]
            assert round(100 * float(values["total"])) == sum(prices)
            assert len({values[f"item{i}"] for i in (1, 2, 3)}) == 3
