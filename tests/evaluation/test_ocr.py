import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from command_line import UserError
from data_pipeline import synthesis
from evaluation import ocr
from evaluation.ocr import Tesseract, found_share, score_text, similarity, units
from evaluation.text_prompts import text_prompts

pytestmark = pytest.mark.machine

needs_tesseract = pytest.mark.skipif(shutil.which("tesseract") is None, reason="Tesseract is not installed")


def wanted(protocol, language, *text):
    return {"protocol": protocol, "language": language, "text": list(text)}


def test_units_are_words_or_characters_without_case_and_punctuation():
    assert units("Hello, World!  It's  7:30", "en") == ["hello", "world", "its", "730"]
    assert units("你好，世界 ABC", "zh") == list("你好世界abc")


def test_found_share_counts_each_reading_once():
    assert found_share(["a", "b", "b"], ["b", "b", "c", "b"]) == 0.5
    assert found_share([], ["a"]) == 0.0
    assert found_share(["x", "a"], ["a"]) == 1.0


def test_similarity_is_normalised_edit_distance():
    assert similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert similarity("", "abc") == 0 and similarity("", "") == 1


def test_three_protocols():
    words = score_text("OPEN dialy", wanted("words", "en", "Open", "daily"))
    assert words["accuracy"] == 0.5 and words["similarity"] == pytest.approx((1 + 1 - 2 / 5) / 2)
    long = score_text("b a d", wanted("long", "en", "a b c d"))
    assert long["accuracy"] == 0.75 and long["similarity"] < 0.75
    assert score_text("春。", wanted("character", "zh", "春")) == {"accuracy": 1.0, "similarity": 1.0}
    assert score_text("春天", wanted("character", "zh", "春"))["accuracy"] == 0.0
    assert score_text("天今气", wanted("long", "zh", "今天天气"))["accuracy"] == 0.75
    with pytest.raises(ValueError, match="no text"):
        score_text("a", wanted("words", "en", "!"))


@needs_tesseract
def test_the_engine_reads_small_pictures():
    image = np.full((96, 256, 3), 240, np.uint8)
    cv2.putText(image, "Fresh bread", (12, 60), cv2.FONT_HERSHEY_DUPLEX, 1.2, (20, 20, 120), 2, cv2.LINE_AA)
    engine = Tesseract(("en",))
    assert score_text(engine.read(image, "words", "en"), wanted("words", "en", "Fresh bread"))["accuracy"] == 1
    assert engine.read(np.full((64, 64, 3), 128, np.uint8), "words", "en") == ""


def test_a_missing_engine_is_a_stated_reason(monkeypatch):
    monkeypatch.setattr(ocr.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="apt-get install tesseract-ocr"):
        Tesseract()


@needs_tesseract
def test_a_missing_language_is_a_stated_reason(monkeypatch):
    monkeypatch.setitem(ocr.LANGUAGES, "en", "klingon")
    with pytest.raises(UserError, match="apt-get install tesseract-ocr-klingon"):
        Tesseract(("en",))


def test_embedded_prompts_quote_what_they_want():
    prompts = text_prompts(None)
    kinds = {p.stratum for p in prompts}
    assert kinds == {"words-en", "long-en", "long-zh", "character-1", "character-2", "character-3"}
    assert all(t in p.text for p in prompts for t in p.metadata["text"])
    assert len({p.id for p in prompts}) == len(prompts) == 96


def test_no_training_page_shows_the_words_that_are_asked_for():
    """Single characters aside: they are what is learned."""

    def words(text, language):
        return " " + (" ".join(units(text, "en")) if language == "en" else "".join(units(text, "zh"))) + " "

    folder = Path(synthesis.__file__).parent
    files = [*folder.glob("corpus/*.txt"), *folder.glob("**/*.toml")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(files) > 15 and len(lines) > 1000
    shown = {language: [words(line, language) for line in lines] for language in ("en", "zh")}
    for prompt in text_prompts(None):
        language = prompt.metadata["language"]
        for text in prompt.metadata["text"] if prompt.metadata["protocol"] != "character" else ():
            wanted = words(text, language) if language == "en" else words(text, language).strip()
            assert not [line for line in shown[language] if wanted in line], text


@pytest.mark.parametrize("field", ["language", "protocol"])
def test_an_unknown_language_or_protocol_is_named(tmp_path, field):
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "a sign", "text": ["open"], field: "tlh"}))
    with pytest.raises(UserError, match=f"prompt 1: {field} 'tlh'; known are"):
        text_prompts(tmp_path / "own.jsonl")


def test_published_formats_are_read(tmp_path):
    for style in ("CVTG", "CVTG-Style"):
        (tmp_path / style).mkdir()
        for regions in (2, 3):
            rows = [
                {"index": 0, "prompt": "A sign says 'Open Daily' and 'Free'.", "carrier_list": []},
                {"index": 1, "prompt": "A cup", "sentence_list": ["Hot", "tea"]},
            ]
            (tmp_path / style / f"{regions}.json").write_text(json.dumps({"data_list": rows}))
    cvtg = text_prompts(tmp_path)
    assert len(cvtg) == 8 and {p.stratum for p in cvtg} == {"2 regions", "3 regions"}
    assert cvtg[0].metadata == wanted("words", "en", "Open Daily", "Free")
    assert cvtg[1].metadata["text"] == ["Hot", "tea"]

    file = tmp_path / "lines.jsonl"
    rows = [
        {"prompt_id": 0, "category": "sign", "length": 8, "prompt": "a wall", "text": ["Long text here", "and here"]},
        {"prompt": "一面墙", "text": "今天天气很好"},
        {"character": "鑫", "level": 3},
    ]
    file.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    english, chinese, character = text_prompts(file)
    assert english.metadata == wanted("long", "en", "Long text here", "and here")
    assert (chinese.metadata["language"], chinese.stratum) == ("zh", "zh")
    assert character.metadata["protocol"] == "character" and "鑫" in character.text and character.stratum == "level 3"


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match="holds no CVTG"):
        text_prompts(tmp_path)
    (tmp_path / "CVTG").mkdir()
    (tmp_path / "CVTG/2.json").write_text("[]")
    with pytest.raises(UserError, match="data_list"):
        text_prompts(tmp_path)
    (tmp_path / "CVTG/2.json").write_text(json.dumps({"data_list": [{"index": 4, "prompt": "no quotes"}]}))
    with pytest.raises(UserError, match="prompt 4: quotes no text"):
        text_prompts(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match="prompt 1: expected"):
        text_prompts(tmp_path / "x.jsonl")
