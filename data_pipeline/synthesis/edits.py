"""Pairs of pictures before and after an edit, with the instruction between them and the mask of what changes.

The caption of such a sample is the instruction; its record names the operation. Both pictures come from one drawing
that differs in one thing, so nothing else changes.
"""

import cv2
import numpy as np

from data_pipeline.synthesis import shape_edits, text_edits
from data_pipeline.synthesis.corpus import Corpus
from data_pipeline.synthesis.fonts import Face
from data_pipeline.synthesis.picture import Picture
from data_pipeline.synthesis.scenes import Place

MASK_MARGIN = 2
"""Pixels by which the mask reaches beyond the last changed pixel."""


def make(
    rng: np.random.Generator, side: int, corpus: Corpus, faces: tuple[Face, ...], places: tuple[Place, ...]
) -> Picture:
    """An edit of shapes (half of them), of a plain page of text, or of writing in a photograph (a quarter each)."""
    family = rng.random()
    if family < 0.5:
        edit = shape_edits.draw_edit(rng, side)
    elif family < 0.75:
        edit = text_edits.draw_page_edit(rng, side, corpus, faces)
    else:
        edit = text_edits.draw_scene_edit(rng, side, corpus, faces, places)
    return Picture(
        edit.after,
        edit.instruction,
        edit.lines,
        {"edit": edit.record},
        edit.before,
        change_mask(edit.before, edit.after),
    )


def change_mask(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """uint8 [h, w]: 255 where two pictures uint8 [h, w, 3] differ, and up to MASK_MARGIN pixels around."""
    changed = (before != after).any(2).astype(np.uint8)
    return cv2.dilate(changed, np.ones((2 * MASK_MARGIN + 1,) * 2, np.uint8)) * 255
