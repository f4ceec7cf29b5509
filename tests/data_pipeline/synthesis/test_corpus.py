from pathlib import Path

import numpy as np
import pytest

from data_pipeline.synthesis.corpus import language_of, read_corpus, width_in_em


def test_languages_are_told_by_characters() -> None:
    assert [language_of(t) for t in ("Grüße!", "春天", "5G 网络", "Привет")] == ["english", "chinese", "mixed", "other"]


def test_passages_are_whole_sentences_or_clauses_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One fish. Two fish! Red?\n\n山不在高，有仙则名。水不在深。\n", encoding="utf-8")
    corpus = read_corpus(tmp_path)
    assert {"One fish.", "One fish. Two fish!", "Two fish! Red?", "One fish. Two fish! Red?"} <= set(
        corpus.passages["english"]
    )
    assert {"山不在高，有仙则名。", "有仙则名", "水不在深。"} <= set(corpus.passages["chinese"])


def test_drawn_passages_keep_to_the_length() -> None:
    corpus, rng = read_corpus(), np.random.default_rng(0)
    for language in corpus.passages:
        for most in (3.0, 10.0, 80.0, 600.0):
            drawn = [corpus.draw(rng, language, most) for _ in range(50)]
            widths = [width_in_em(d) for d in drawn if d]
            assert widths and max(widths) <= most
            assert np.mean(widths) > 0.2 * min(most, 300)
    assert corpus.draw(rng, "chinese", 0.5) is None


def test_bad_corpora_get_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="bad.txt is not UTF-8"):
        read_corpus(tmp_path)
    (tmp_path / "bad.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        read_corpus(tmp_path)
