import numpy as np
import pytest

from data_pipeline.synthesis.fonts import find_faces
from data_pipeline.synthesis.typesetting import Style, fit_passage, set_passage

pytestmark = pytest.mark.machine

FACES = find_faces()
SANS = next(face for face in FACES if face.name == "DejaVu Sans Book")
CHINESE = next((face for face in FACES if face.covers("中文")), None)
TEXT = "To plant a bulb, dig a hole three times as deep as the bulb is tall. Straightforward, isn't it?"


def check_boxes(coverage: np.ndarray, lines) -> None:
    """Every drawn pixel lies in a line's box, and every box touches ink on all four sides."""
    left = coverage.copy()
    for line in lines:
        x0, y0, x1, y1 = line.box
        inside = coverage[y0:y1, x0:x1]
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any(), line
        left[y0:y1, x0:x1] = 0
    assert not left.any()


@pytest.mark.parametrize("align", ["left", "center", "right", "justify"])
@pytest.mark.parametrize("tracking", [0.0, 0.1])
def test_boxes_are_those_of_the_drawn_pixels(align: str, tracking: float) -> None:
    block = set_passage(TEXT, Style(SANS, 20, 1.4, tracking, align), 300, 300)
    assert " ".join(line.text for line in block.lines) == TEXT
    check_boxes(block.coverage, block.lines)


def test_alignment_places_the_lines() -> None:
    edges = {}
    for align in ("left", "right", "center", "justify"):
        block = set_passage(TEXT, Style(SANS, 20, align=align), 300, 300)
        width = block.coverage.shape[1]
        edges[align] = np.array([(line.box[0], width - line.box[2]) for line in block.lines[:-1]])
    assert (edges["left"][:, 0] <= 3).all() and edges["left"][:, 1].max() > 8
    assert (edges["right"][:, 1] <= 3).all() and edges["right"][:, 0].max() > 8
    assert np.abs(edges["center"][:, 0] - edges["center"][:, 1]).max() <= 4
    assert (edges["justify"] <= 4).all()


def test_what_does_not_fit_is_refused_or_shrunk() -> None:
    assert set_passage(TEXT, Style(SANS, 60), 300, 200) is None
    block = fit_passage(TEXT, Style(SANS, 60), 300, 200, least_px=12)
    assert block is not None and block.coverage.shape[0] <= 200 and block.coverage.shape[1] <= 300
    assert fit_passage(TEXT, Style(SANS, 60), 60, 40, least_px=12) is None


@pytest.mark.skipif(CHINESE is None, reason="no font with Chinese characters on this machine")
def test_vertical_columns_run_from_right_to_left() -> None:
    block = set_passage("第12届 AI 大会（上海）开幕，春眠不觉晓。", Style(CHINESE, 24, vertical=True), 200, 180)
    check_boxes(block.coverage, block.lines)
    lefts = [line.box[0] for line in block.lines]
    assert len(lefts) > 1 and lefts == sorted(lefts, reverse=True)
    assert all(line.box[2] - line.box[0] <= 30 for line in block.lines)


@pytest.mark.skipif(CHINESE is None, reason="no font with Chinese characters on this machine")
def test_vertical_marks_move_and_turn() -> None:
    size = 40
    comma = set_passage("中，", Style(CHINESE, size, vertical=True), 100, 100)
    box = comma.lines[0].box
    ink = np.argwhere(comma.coverage[size:] > 0)
    assert ink[:, 0].mean() < size / 2 and ink[:, 1].mean() > (box[0] + box[2]) / 2  # upper right of its square
    bracket = set_passage("（", Style(CHINESE, size, vertical=True), 100, 100).lines[0].box
    assert bracket[2] - bracket[0] > 2 * (bracket[3] - bracket[1])  # lies on its side


def test_right_to_left_scripts_are_shaped_or_refused() -> None:
    from PIL import features

    block = set_passage("שלום", Style(SANS, 30), 200, 60)
    assert (block is not None) == features.check("raqm")
    if block is not None:
        mirrored = set_passage("םולש", Style(SANS, 30), 200, 60)
        assert not np.array_equal(block.coverage, mirrored.coverage)
