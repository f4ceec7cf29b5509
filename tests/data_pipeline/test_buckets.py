import math

import numpy as np
import pytest
from PIL import Image

from data_pipeline.buckets import RATIOS, buckets, centre_crop, choose_bucket
from data_pipeline.pictures import fit


@pytest.mark.parametrize("res", [64, 96, 256, 640, 1024, 1328])
def test_buckets_have_the_area_and_sides_the_model_takes(res: int):
    for (w, h), (a, b) in zip(buckets(res), RATIOS, strict=True):
        assert w % 16 == h % 16 == 0
        assert abs(w - res * math.sqrt(a / b)) <= 8 and abs(h - res * math.sqrt(b / a)) <= 8
    assert buckets(res)[0] == (res, res)
    assert {(h, w) for w, h in buckets(res)} == set(buckets(res))


def test_the_nearest_ratio_is_chosen_symmetrically():
    rng = np.random.default_rng(0)
    for _ in range(500):
        w, h = (int(x) for x in rng.integers(1, 5000, size=2))
        bucket = choose_bucket(w, h, 640)
        assert choose_bucket(h, w, 640) == bucket[::-1]
        stretch = max(w / h / (bucket[0] / bucket[1]), bucket[0] / bucket[1] / (w / h))
        assert all(stretch <= max(w / h / (x / y), x / y / (w / h)) + 1e-9 for x, y in buckets(640))


def test_the_crop_is_centred_fills_the_picture_one_way_and_has_the_ratio():
    for w, h in [(100, 100), (641, 480), (33, 900), (900, 33)]:
        left, top, right, bottom = centre_crop(w, h, (528, 784))
        assert (right - left) / (bottom - top) == pytest.approx(528 / 784)
        assert left + right == pytest.approx(w) and top + bottom == pytest.approx(h)
        assert min(left, top) == pytest.approx(0)


def test_rounding_leads_no_crop_out_of_its_picture():
    """Pillow refuses a box that begins at -1e-13; of all sizes one in a hundred would."""
    sizes = [(w, h) for w in range(64, 3000, 37) for h in range(64, 3000, 41)]
    for w, h in [(2284, 1991), *sizes]:
        left, top, right, bottom = centre_crop(w, h, choose_bucket(w, h, 1328))
        assert 0 <= left < right <= w and 0 <= top < bottom <= h


def test_fit_keeps_the_middle(photograph: np.ndarray):
    wide = Image.fromarray(np.concatenate([np.zeros_like(photograph), photograph, np.zeros_like(photograph)], axis=1))
    pixels, box = fit(Image.fromarray(photograph), 128)
    assert pixels.shape == (128, 128, 3) and box == (0, 0, 512, 512)
    pixels, _ = fit(wide, 128)
    reference = np.asarray(wide.resize((224, 80), Image.Resampling.LANCZOS, box=(51.2 - 0, 0, 1484.8, 512)))
    assert pixels.shape == reference.shape and np.abs(pixels.astype(int) - reference).mean() < 1


@pytest.mark.parametrize("res", [0, -16, 100])
def test_other_resolutions_are_refused(res: int):
    with pytest.raises(ValueError, match="multiple of 16"):
        buckets(res)
