import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.ft2font import FT2Font

from data_pipeline.synthesis.corpus import Corpus, width_in_em
from data_pipeline.synthesis.fonts import choose_face, find_faces, font_folders
from data_pipeline.synthesis.picture import generator
from data_pipeline.synthesis.pure import make

pytestmark = pytest.mark.machine

WHEEL = find_faces(font_folders()[:1])
CUNEIFORM = "\U00012000"


def test_the_wheel_alone_serves_latin() -> None:
    families = {face.family for face in WHEEL}
    assert families >= {"DejaVu Sans", "DejaVu Serif", "DejaVu Sans Mono"}
    assert all(face.covers("The quick brown fox, 0123456789!") for face in WHEEL)
    looks = {face.name: face.look for face in WHEEL}
    assert looks["DejaVu Serif Bold"] == "bold serif" and looks["DejaVu Sans Mono Oblique"] == "italic monospaced"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system's folders are fixed")
def test_fonts_are_looked_for_where_xdg_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a/fonts").mkdir(parents=True)
    (tmp_path / "own/fonts").mkdir(parents=True)
    monkeypatch.setenv("XDG_DATA_DIRS", f"{tmp_path}/a:{tmp_path}/none")
    monkeypatch.setenv("XDG_DATA_HOME", f"{tmp_path}/own")
    assert font_folders()[1:] == (tmp_path / "a/fonts", tmp_path / "own/fonts")


def test_coverage_agrees_with_freetype() -> None:
    chars = [chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0x180), 0x3B1, 0x416, 0x4E2D, 0x5E99, 0x12000, 0x1F600)]
    for face in find_faces()[::5]:
        if face.index == 0:
            freetype = FT2Font(str(face.path))
            wrong = [c for c in chars if face.covers(c) and freetype.get_char_index(ord(c)) == 0]
            missed = [c for c in chars if not face.covers(c) and freetype.get_char_index(ord(c)) != 0]
            assert not wrong and not [c for c in missed if c not in "\xad"], (face.name, wrong, missed)


def test_a_passage_with_one_missing_glyph_is_dropped_whole() -> None:
    assert choose_face(WHEEL, "plain words", np.random.default_rng(0)) is not None
    assert choose_face(WHEEL, f"plain words {CUNEIFORM}", np.random.default_rng(0)) is None
    passages = ["plain words", f"plain words and one {CUNEIFORM}"]
    corpus = Corpus({"english": passages}, {"english": [width_in_em(p) for p in passages]})
    for i in range(20):
        picture = make(generator(0, i), 192, corpus, WHEEL)
        assert "".join(line.text for line in picture.lines).replace(" ", "").lower() == "plainwords"


def test_a_corpus_that_no_font_covers_is_refused() -> None:
    corpus = Corpus({"other": [CUNEIFORM]}, {"other": [1.0]})
    with pytest.raises(ValueError, match="no font here draws any passage"):
        make(generator(0, 0), 128, corpus, WHEEL)
