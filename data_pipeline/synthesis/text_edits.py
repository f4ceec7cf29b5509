"""Edits of writing: replace, recolour, move, remove or add a passage on a page or in a photograph."""

from dataclasses import replace

import numpy as np

from data_pipeline.synthesis import pure, scenes
from data_pipeline.synthesis.colors import CHINESE, NAMED, contrast
from data_pipeline.synthesis.corpus import Corpus, language_of, width_in_em
from data_pipeline.synthesis.edit import Edit
from data_pipeline.synthesis.fonts import Face
from data_pipeline.synthesis.line_breaking import has_chinese
from data_pipeline.synthesis.picture import draw_size

PAGE_OPERATIONS = ("replace text", "recolor", "move", "remove", "add")
SCENE_OPERATIONS = ("replace text", "remove", "add")
ANCHORS = {
    "upper left corner": (0.0, 0.0),
    "upper right corner": (0.0, 1.0),
    "lower left corner": (1.0, 0.0),
    "lower right corner": (1.0, 1.0),
    "middle": (0.5, 0.5),
}
_CHINESE_ANCHORS = dict(zip(ANCHORS, ("左上角", "右上角", "左下角", "右下角", "正中"), strict=True))
_LONGEST = 60
"""Em: edits are of words and short paragraphs, which an instruction can quote."""


def draw_page_edit(rng: np.random.Generator, side: int, corpus: Corpus, faces: tuple[Face, ...]) -> Edit:
    """An edit of a plain page of text. Raises ValueError if nothing of the corpus can be drawn."""
    for _ in range(1000):
        page, (ink, ground) = pure.draw_page(rng, draw_size(rng, side), corpus, faces)
        if page is None or width_in_em(page.text) > _LONGEST:
            continue
        operation = PAGE_OPERATIONS[rng.integers(len(PAGE_OPERATIONS))]
        changed = _change_page(rng, operation, page, ink, ground, corpus)
        if changed is None:
            continue
        before, after, english, chinese = changed
        drawn = pure.render(before), pure.render(after)
        if None in drawn or (drawn[0][0] == drawn[1][0]).all():
            continue
        record = {"operation": operation, "of": "page", "before": before.text, "after": after.text}
        instruction = _choose(rng, english, chinese, before.text + after.text)
        return Edit(drawn[0][0], drawn[1][0], instruction, record, drawn[1][1].lines)
    raise ValueError(f"no font here draws any passage of the corpus for an edit at {side} px")


def _change_page(rng, operation: str, page: pure.Page, ink: str, ground: str, corpus: Corpus):
    """(page before, page after, instruction in English, in Chinese); None if the page doesn't allow it."""
    blank = replace(page, text="")
    if operation == "remove":
        return page, blank, "Remove the text", "去掉文字"
    if operation == "add":
        return blank, page, f'Write "{page.text}" in {ink}', f"用{CHINESE[ink]}写上“{page.text}”"
    if operation == "recolor":
        apart = {n: np.abs(np.subtract(rgb, NAMED[ink])).sum() for n, rgb in NAMED.items()}
        able = [n for n, rgb in NAMED.items() if apart[n] > 150 and contrast(rgb, NAMED[ground]) >= 4.5]
        if not able:
            return None
        color = able[rng.integers(len(able))]
        after = replace(page, ink=NAMED[color])
        return page, after, f"Make the text {color}", f"把文字改成{CHINESE[color]}"
    if operation == "move":
        goal = list(ANCHORS)[rng.integers(len(ANCHORS))]
        page = replace(page, anchor=page.anchor if page.anchor != ANCHORS[goal] else (0.5, 0.0))
        after = replace(page, anchor=ANCHORS[goal])
        if not _moves_visibly(page, after):
            return None
        return page, after, f"Move the text to the {goal}", f"把文字移到{_CHINESE_ANCHORS[goal]}"
    text = _similar_passage(rng, page.text, page.style.face, corpus)
    if text is None:
        return None
    return page, replace(page, text=text), *_replacement(rng, page.text, text)


def _moves_visibly(before: pure.Page, after: pure.Page) -> bool:
    drawn = pure.render(before), pure.render(after)
    if None in drawn:
        return False
    (x0, y0, *_), (x1, y1, *_) = (block.lines[0].box for _, block in drawn)
    return max(abs(x1 - x0), abs(y1 - y0)) > 0.15 * min(before.size)


def draw_scene_edit(
    rng: np.random.Generator, side: int, corpus: Corpus, faces: tuple[Face, ...], places: tuple[scenes.Place, ...]
) -> Edit:
    """An edit of writing in a photograph. Raises ValueError if nothing of the corpus can be drawn."""
    for _ in range(1000):
        place = places[rng.integers(len(places))]
        scene = scenes.draw_scene(rng, side, place, corpus, faces)
        if scene is None:
            continue
        operation = SCENE_OPERATIONS[rng.integers(len(SCENE_OPERATIONS))]
        blank, thing, chinese_thing = replace(scene, text=""), *scenes.name_carrier(scene)
        if operation == "remove":
            before, after, english, chinese = scene, blank, f"Erase the text from {thing}", f"擦掉{chinese_thing}上的字"
        elif operation == "add":
            before, after = blank, scene
            english, chinese = f'Write "{scene.text}" on {thing}', f"在{chinese_thing}上写“{scene.text}”"
        else:
            text = _similar_passage(rng, scene.text, scene.style.face, corpus)
            if text is None:
                continue
            before, after = scene, replace(scene, text=text)
            english, chinese = _replacement(rng, scene.text, text)
        drawn = scenes.render(before), scenes.render(after)
        if None in drawn:
            continue
        record = {"operation": operation, "of": "scene", "before": before.text, "after": after.text}
        instruction = _choose(rng, english, chinese, before.text + after.text)
        return Edit(drawn[0][0], drawn[1][0], instruction, record, drawn[1][1])
    raise ValueError(f"no font here draws any passage of the corpus for an edit at {side} px")


def _similar_passage(rng: np.random.Generator, text: str, face: Face, corpus: Corpus) -> str | None:
    """Another passage in the same language, of about the same length, that the face covers."""
    width = width_in_em(text)
    other = corpus.draw(rng, language_of(text), 1.3 * width, 0.5 * width)
    return other if other and other != text and face.covers(other) else None


def _replacement(rng: np.random.Generator, old: str, new: str) -> tuple[str, str]:
    forms = (f'Replace "{old}" with "{new}"', f'Change the text to "{new}"')
    return forms[rng.integers(2)], f"把“{old}”换成“{new}”"


def _choose(rng: np.random.Generator, english: str, chinese: str, text: str) -> str:
    return chinese if has_chinese(text) and rng.random() < 0.5 else english
