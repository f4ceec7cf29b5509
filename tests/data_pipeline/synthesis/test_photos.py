import numpy as np
import pytest

from data_pipeline.synthesis.kinds import Recipe, Sources
from data_pipeline.synthesis.photos import draw_crop, load_photo, make, read_views
from data_pipeline.synthesis.picture import generator

VIEWS = read_views()


def test_crops_show_the_subject_and_stay_inside() -> None:
    rng, shown = np.random.default_rng(0), set()
    for view in VIEWS:
        width, height = load_photo(view.path).size
        for ratio in (1 / 3, 9 / 16, 0.75, 1.0, 1.5, 3.0):
            for _ in range(5):
                crop = draw_crop(rng, (width, height), view, ratio)
                if crop is None:
                    continue
                shown.add(view)
                x0, y0, x1, y1 = view.within or (0, 0, width, height)
                assert x0 - 1e-6 <= crop[0] and y0 - 1e-6 <= crop[1] and crop[2] <= x1 + 1e-6 and crop[3] <= y1 + 1e-6
                assert abs((crop[2] - crop[0]) / (crop[3] - crop[1]) - ratio) < 1e-6
                if view.subject:
                    left, top, right, bottom = view.subject
                    assert crop[0] <= left + 1e-6 and crop[1] <= top + 1e-6
                    assert crop[2] >= right - 1e-6 and crop[3] >= bottom - 1e-6
    assert shown == set(VIEWS)


def test_every_photograph_suits_some_ratio_at_every_resolution() -> None:
    for side in (64, 96, 128, 256):
        for path in {view.path for view in VIEWS}:
            of_photograph = tuple(view for view in VIEWS if view.path == path)
            for i in range(4):
                picture = make(generator(i, 0), side, of_photograph)
                height, width = picture.image.shape[:2]
                assert height % 16 == width % 16 == 0 and 0.7 < height * width / side**2 < 1.4


def test_photographs_that_are_not_named_are_held_out() -> None:
    recipe = Recipe((("photo", 1.0), ("scene", 1.0)), 96, 0, Sources(photos=("camera.png", "gravel.png")))
    assert {recipe.make(i).meta["photo"] for i in range(12)} == {"camera.png", "gravel.png"}
    with pytest.raises(ValueError, match="no photographs called nobody.png"):
        read_views(("nobody.png",))
