"""Pages, scenes and layouts: boxes against pixels, found by drawing the same picture without its text."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.ft2font import FT2Font

from data_pipeline.synthesis import layouts, pure, scenes
from data_pipeline.synthesis.corpus import read_corpus
from data_pipeline.synthesis.fonts import find_faces
from data_pipeline.synthesis.photos import read_views
from data_pipeline.synthesis.picture import draw_size, generator
from data_pipeline.synthesis.templates import draw_fields, read_templates

pytestmark = pytest.mark.machine

CORPUS, FACES, PLACES, VIEWS = read_corpus(), find_faces(), scenes.read_places(), read_views()
TEMPLATES = read_templates()


def check_boxes(image: np.ndarray, blank: np.ndarray, lines, faint: int, slack: int) -> None:
    """What differs by more than `faint` lies within `slack` pixels of the boxes; each box is full to its sides."""
    ink = np.abs(image.astype(int) - blank).max(2) > faint
    for line in lines:
        x0, y0, x1, y1 = line.box
        assert 0 <= x0 < x1 <= ink.shape[1] and 0 <= y0 < y1 <= ink.shape[0]
        (top, *_, bottom), (left, *_, right) = (np.flatnonzero(ink[y0:y1, x0:x1].any(axis)) for axis in (1, 0))
        spare = (top, y1 - y0 - 1 - bottom, left, x1 - x0 - 1 - right)
        assert max(spare) <= slack, (line, spare)
    for line in lines:
        x0, y0, x1, y1 = line.box
        ink[max(0, y0 - slack) : y1 + slack, max(0, x0 - slack) : x1 + slack] = False
    assert not ink.any()


@pytest.mark.parametrize("side", [64, 256])
def test_boxes_of_pages_are_those_of_the_pixels(side: int) -> None:
    seen, i = 0, 0
    while seen < 24:  # a passage that no font here covers, or that does not fit, gives no page
        rng, i = generator(0, i), i + 1
        page, _ = pure.draw_page(rng, draw_size(rng, side), CORPUS, FACES)
        drawn = None if page is None else pure.render(page)
        if drawn is not None:
            blank, _ = pure.render(replace(page, text=""))
            check_boxes(drawn[0], blank, drawn[1].lines, faint=0, slack=1)
            seen += 1
    assert i <= 120


def test_boxes_of_scenes_are_those_of_the_pixels() -> None:
    seen, i = 0, 0
    while seen < 10:
        rng, i = generator(1, i), i + 1
        scene = scenes.draw_scene(rng, 192, PLACES[rng.integers(len(PLACES))], CORPUS, FACES)
        drawn = None if scene is None else scenes.render(scene)
        if drawn is not None:
            blank, no_lines = scenes.render(replace(scene, text=""))
            assert no_lines == ()
            check_boxes(drawn[0], blank, drawn[1], faint=40, slack=3)
            seen += 1
    assert i <= 60


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
def test_every_template_draws_in_every_language(template) -> None:
    for language, wording in template.wordings.items():
        if language == "chinese" and not any(face.covers("中文") for face in FACES):
            continue
        alone = replace(template, wordings={language: wording})
        picture = layouts.make(generator(2, 0, language), 256, (alone,), CORPUS, FACES, VIEWS)
        assert picture.record == {"language": language, "template": template.name}
        caption = picture.caption.replace(" ", "")
        assert all(line.text.replace(" ", "") in caption for line in picture.lines)


def test_boxes_of_layouts_are_those_of_the_pixels() -> None:
    for i in range(8):
        rng = generator(3, i)
        template = TEMPLATES[i % len(TEMPLATES)]
        values = draw_fields(rng, template.wordings["english"], CORPUS)
        size = draw_size(rng, 256, lambda h, w: min(h, w) >= 192)
        sheet = layouts.draw_sheet(rng, size, template, values, FACES, VIEWS)
        drawn = layouts.render(sheet)
        if drawn is not None:
            blank, _ = layouts.render(replace(sheet, values=dict.fromkeys(values, "")))
            check_boxes(drawn[0], blank, drawn[1], faint=0, slack=1)


def check_glyphs(count: int) -> None:
    """No character of any page is the font's glyph 0, which fonts draw as a box."""
    by_name = {face.name: face for face in FACES}
    fonts: dict[str, FT2Font] = {}
    for i in range(count):
        rng = generator(4, i)
        picture = pure.make(rng, 128, CORPUS, FACES)
        name = picture.record["font"]
        if name not in fonts:
            fonts[name] = FT2Font(str(by_name[name].path), face_index=by_name[name].index)
        text = "".join(line.text for line in picture.lines)
        assert all(fonts[name].get_char_index(ord(c)) for c in text), (name, text)


def test_no_glyph_is_missing() -> None:
    check_glyphs(150)


@pytest.mark.slow
def test_no_glyph_is_missing_in_ten_thousand() -> None:
    check_glyphs(10_000)
