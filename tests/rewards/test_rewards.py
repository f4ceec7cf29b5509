import os
import time

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from command_line import UserError
from rewards import WeightedRewards, make_reward
from rewards.ocr import OCRReward, edit_distance, quoted_text, text_score
from rewards.shapes import ShapesReward

FONT = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def picture(text: str, side: int = 128, size: int = 22, at: tuple[int, int] = (8, 50)) -> np.ndarray:
    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).text(at, text, fill="black", font=ImageFont.truetype(FONT, size))
    return np.asarray(image)


@pytest.fixture(scope="module")
def ocr():
    return OCRReward()


def test_edit_distance_on_known_pairs():
    known = {
        ("kitten", "sitting"): 3,
        ("", "abc"): 3,
        ("abc", ""): 3,
        ("same", "same"): 0,
        ("ab", "ba"): 2,
        ("你好", "你们好"): 1,
    }
    for (a, b), distance in known.items():
        assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_text_score_ignores_case_and_spaces_and_never_goes_below_zero():
    assert text_score("HELLO there", "hello There") == (1.0, 1.0)
    assert text_score("", "abc") == (0.0, 0.0)
    assert text_score("xxxxxxxxxxxx", "abc") == (0.0, 0.0)
    assert text_score("abx", "abc") == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert text_score("cba", "abc") == (pytest.approx(1 / 3), 1.0)


def test_quotes_of_all_kinds():
    assert quoted_text('a sign "Open" and “Day”, 「咖啡」') == "Open Day 咖啡"
    assert quoted_text("no quotes, don't count") == ""


def test_ocr_reads_and_ranks(ocr):
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3)).astype(np.uint8)
    right = picture("coffee")
    images = [right, picture("coffin"), picture("zebra"), noise, np.full_like(right, 255)]
    scores = ocr(images, ['a cup that says "Coffee"'] * 5, [{}] * 5)["ocr"].tolist()
    assert scores[0] == 1.0
    assert scores[0] > scores[1] > scores[2] >= 0
    assert scores[3] == scores[4] == 0.0


def test_known_boxes_are_read_where_the_whole_is_not(ocr):
    """Two lines far apart in small letters: the boxes tell where to look, which helps and never hurts."""
    image = Image.new("RGB", (192, 192), "white")
    draw = ImageDraw.Draw(image)
    lines = []
    for text, at in (("morning", (10, 20)), ("evening", (90, 150))):
        font = ImageFont.truetype(FONT, 16)
        draw.text(at, text, fill="black", font=font)
        lines.append({"text": text, "box": list(draw.textbbox(at, text, font=font))})
    bare = [{"text": line["text"]} for line in lines]
    with_boxes, without = ocr([np.asarray(image)] * 2, ["x"] * 2, [{"lines": lines}, {"lines": bare}])["ocr"].tolist()
    assert with_boxes >= without and with_boxes > 0.9


def test_ocr_wants_text_to_look_for(ocr):
    with pytest.raises(ValueError, match="quotes none: 'a red circle'"):
        ocr([picture("x")], ["a red circle"], [{}])


def test_weighted_sum_and_what_is_logged(monkeypatch):
    metadata = [
        {"tag": "colors", "prompt": "a red circle", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    ]
    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).ellipse((28, 28, 68, 68), fill=(222, 32, 38))
    rewards, asked = WeightedRewards(["shapes_soft=2", "shapes"]), []
    call = ShapesReward.__call__
    monkeypatch.setattr(ShapesReward, "__call__", lambda self, *given: asked.append(given) or call(self, *given))
    scores = rewards([np.asarray(image)], ["a red circle"], metadata)
    assert len(asked) == 1
    assert set(scores) == {"reward", "shapes", "shapes_soft"}
    assert scores["reward"] == 2 * scores["shapes_soft"] + scores["shapes"]
    assert scores["shapes"] == 1.0


@pytest.mark.parametrize("terms", [["beauty"], ["ocr=much"], []])
def test_unknown_rewards_are_named(terms):
    with pytest.raises(ValueError, match="known are shapes|ocr=much"):
        WeightedRewards(terms)


def test_every_reward_of_this_machine_gives_its_own_score():
    metadata = [{"include": [{"class": "circle", "count": 1}], "lines": [{"text": "abc"}]}]
    for name in ("shapes", "shapes_soft", "ocr"):
        scores = make_reward(name)([picture("abc")], ["p"], metadata)
        assert scores[name].shape == (1,) and str(scores[name].dtype) == "torch.float32"


class Scripted:
    """A reward that gives what it was told."""

    def __init__(self, values, seconds: float = 0.0):
        self.values, self.seconds = values, seconds

    def __call__(self, images, prompts, metadata):
        time.sleep(self.seconds)
        return {"odd": torch.tensor(self.values)}


def scripted(values, seconds: float = 0.0, deadline_s: float = 60.0) -> WeightedRewards:
    rewards = WeightedRewards(["shapes"], deadline_s)
    rewards.terms = [("mine", 1.0, Scripted(values, seconds))]
    return rewards


@pytest.mark.parametrize(
    "values, says",
    [
        ([0.1, 0.2, 0.3, 0.4], "2 pictures got scores of shape \\(4,\\)"),
        ([0.1], "2 pictures got scores of shape \\(1,\\)"),
        ([0.1, float("nan")], "1 of 2 scores are NaN"),
    ],
)
def test_scores_that_do_not_fit_the_pictures_are_refused_by_name(values, says):
    with pytest.raises(ValueError, match=f"reward mine, score odd: {says}"):
        scripted(values)([picture("a"), picture("b")], ["p", "p"], [{}, {}])


class CalledReward:
    def __call__(self, images, prompts, metadata):
        return {"reward": torch.ones(len(images))}


def test_a_score_called_reward_does_not_stand_for_the_sum():
    rewards = scripted([0.5])
    rewards.terms.append(("server", 2.0, CalledReward()))
    assert rewards([picture("a")], ["p"], [{}])["reward"].tolist() == [2.5]


def test_a_reward_that_does_not_answer_is_named():
    with pytest.raises(ValueError, match="reward mine gave no answer within 0.05 s"):
        scripted([0.5], seconds=5, deadline_s=0.05)([picture("a")], ["p"], [{}])


def test_what_a_reward_raises_is_raised():
    with pytest.raises(ValueError, match="quotes none"):
        WeightedRewards(["ocr"])([picture("x")], ["a red circle"], [{}])


MINE = """
import torch

class Brightness:
    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, images, prompts, metadata):
        return {"brightness": torch.tensor([i.mean() / 255 * self.scale for i in images])}
"""


def test_a_reward_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    rewards = WeightedRewards([f"{tmp_path}/mine.py:Brightness(scale=2.0)=0.5"])
    scores = rewards([np.full((8, 8, 3), 51, np.uint8)], ["p"], [{}])
    assert scores["brightness"].item() == pytest.approx(0.4) and scores["reward"].item() == pytest.approx(0.2)
    for term, says in (("none.py:X", "none.py does not exist"), (f"{tmp_path}/mine.py:Dark", "no Dark"),
                       (f"{tmp_path}/mine.py:Brightness(size=3)", "unexpected keyword")):  # fmt: skip
        with pytest.raises((ValueError, UserError), match=says):
            WeightedRewards([term])
