import cv2
import numpy as np
import pytest

from data_pipeline.synthesis import shapes_world, text_edits
from data_pipeline.synthesis.corpus import read_corpus
from data_pipeline.synthesis.edits import MASK_MARGIN, change_mask, make
from data_pipeline.synthesis.fonts import find_faces
from data_pipeline.synthesis.picture import generator
from data_pipeline.synthesis.scenes import read_places
from data_pipeline.synthesis.shape_edits import ZONES, draw_edit

pytestmark = pytest.mark.machine

CORPUS, FACES, PLACES = read_corpus(), find_faces(), read_places()


def components(image: np.ndarray) -> np.ndarray:
    """Areas, centres [N, 2] (x, y) of the connected regions that are not ground, by OpenCV."""
    ground = np.median(image.reshape(-1, 3), axis=0)
    apart = (np.abs(image - ground).max(2) > 24).astype(np.uint8)
    _, _, stats, centers = cv2.connectedComponentsWithStats(apart)
    large = stats[1:, cv2.CC_STAT_AREA] > 30
    return centers[1:][large]


def test_shape_edits_do_what_they_say() -> None:
    seen = set()
    for i in range(80):
        edit = draw_edit(generator(0, i), 128)
        operation = edit.record["operation"]
        seen.add(operation)
        before, after = components(edit.before), components(edit.after)
        assert len(after) - len(before) == {"add": 1, "remove": -1}.get(operation, 0), edit.instruction
        mask = change_mask(edit.before, edit.after) > 0
        if operation == "recolor":
            assert np.allclose(before, after, atol=0.5)
        zone = next((z for z in ZONES if z in edit.instruction), None)
        if operation in ("add", "move") and zone:
            row, column = ZONES[zone]
            height, width = mask.shape
            inside = [(y > height / 2) == row and (x > width / 2) == column for x, y in after]
            new = [p for p in after if np.hypot(*(before - p).T).min() > 3]
            assert len(new) == 1 and inside[after.tolist().index(new[0].tolist())], edit.instruction
    assert seen == {"recolor", "move", "remove", "add"}


def test_no_edit_shows_a_held_out_pair() -> None:
    held_out = [f"{color} {shape}" for color, shape in shapes_world.HELD_OUT_PAIRS]
    for i in range(200):
        record = draw_edit(generator(1, i), 64).record
        assert not any(pair in record["before"] + record["after"] for pair in held_out)


@pytest.mark.parametrize("side", [64, 192])
def test_nothing_changes_outside_the_mask(side: int) -> None:
    operations = set()
    for i in range(24):
        picture = make(generator(2, i), side, CORPUS, FACES, PLACES)
        operations.add(picture.record["edit"]["operation"])
        inside = picture.mask > 0
        assert picture.mask.shape == picture.image.shape[:2] == picture.before.shape[:2]
        assert np.array_equal(picture.image[~inside], picture.before[~inside])
        changed = (picture.image != picture.before).any(2)
        assert changed.any() and inside.mean() < 0.9
        reach = cv2.dilate(changed.astype(np.uint8), np.ones((2 * MASK_MARGIN + 1,) * 2)) > 0
        assert np.array_equal(reach, inside)
    assert len(operations) >= 4


def test_instructions_quote_the_new_text() -> None:
    for i in range(30):
        edits = (
            text_edits.draw_page_edit(generator(3, i), 128, CORPUS, FACES),
            text_edits.draw_scene_edit(generator(3, i), 128, CORPUS, FACES, PLACES) if i < 6 else None,
        )
        for edit in filter(None, edits):
            shown = "".join(line.text for line in edit.lines).replace(" ", "")
            assert shown == edit.record["after"].replace(" ", "").replace("\n", "")
            if edit.record["operation"] in ("add", "replace text"):
                assert edit.record["after"] in edit.instruction
