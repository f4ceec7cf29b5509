"""Pages read by an OCR engine that the pipeline doesn't use. bench/synthesis.py measures the same on more pages."""

import numpy as np
import pytest

from data_pipeline.synthesis.corpus import read_corpus
from data_pipeline.synthesis.fonts import find_faces
from data_pipeline.synthesis.picture import generator
from data_pipeline.synthesis.pure import make
from data_pipeline.synthesis.read_back import is_common, missing_models, model_for, normalize, read
from rewards.ocr import edit_distance

pytestmark = pytest.mark.machine

FACES = find_faces()


@pytest.mark.parametrize(("language", "count", "most"), [("english", 8, 0.02), ("chinese", 8, 0.06)])
def test_pages_can_be_read(language: str, count: int, most: float) -> None:
    if lacking := missing_models(model_for(language, False)):
        pytest.skip(f"Tesseract lacks {', '.join(lacking)}: apt-get install tesseract-ocr tesseract-ocr-chi-sim")
    if language == "chinese" and not any(face.covers("中文") for face in FACES):
        pytest.skip("no font with Chinese characters on this machine")
    corpus, distances, index = read_corpus(), [], 0
    while len(distances) < count:
        page = make(generator(0, index, "read back"), 256, corpus, FACES)
        index += 1
        text = "".join(line.text for line in page.lines)
        # Phrases of common characters: at single words and rare characters Tesseract guesses, however they are drawn.
        if (
            (page.record["language"], page.record["vertical"]) != (language, False)
            or len(text) < 8
            or not is_common(text)
        ):
            continue
        wanted = normalize(" ".join(line.text for line in page.lines), language)
        seen = read(page.image, page.lines, language)
        distances.append(edit_distance(seen, wanted) / max(len(seen), len(wanted)))
    assert np.mean(distances) <= most, distances
