import numpy as np
import pytest

from command_line import UserError
from evaluation import edit_suite
from evaluation.edit_suite import EditSuite, overlap, psnr, same_objects
from evaluation.scoring import Found


@pytest.fixture(scope="module")
def suite():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edit_suite, "EDITS", 40)
        return EditSuite((64, 64))


def test_the_true_edit_passes_and_the_unedited_picture_fails(suite):
    assert {p.stratum for p in suite.prompts} == {"recolor", "move", "remove", "add"}
    true = suite.score([suite.truth(p, suite.size) for p in suite.prompts], suite.prompts)
    assert np.mean(true["carried out"]) == 1 and min(true["unchanged outside (dB)"]) == edit_suite.BEST_PSNR
    before = suite.score([suite.other(p, suite.size) for p in suite.prompts], suite.prompts)
    assert np.mean(before["carried out"]) <= 0.05 and min(before["unchanged outside (dB)"]) == edit_suite.BEST_PSNR
    prompt = suite.prompts[0]
    (source,) = suite.sources(prompt, suite.size)
    shifted = suite.score([np.roll(suite.truth(prompt, suite.size), 20, 0)], [prompt])
    assert source.shape == (64, 64, 3) and shifted["carried out"] == [0.0]
    assert shifted["unchanged outside (dB)"][0] < 30


def test_edits_are_a_function_of_the_size(suite, monkeypatch):
    monkeypatch.setattr(edit_suite, "EDITS", 3)
    again = EditSuite((64, 64), suite.judge)
    assert all((again.edits[k].after == suite.edits[k].after).all() for k in again.edits)
    with pytest.raises(UserError, match="no edits of 64 x 256"):
        EditSuite((64, 256), suite.judge)


def test_same_objects_means_class_colour_and_place():
    a = {"star": [Found((0, 0, 10, 10), 0.9, "red"), Found((20, 0, 30, 10), 0.8, "blue")]}
    assert same_objects(a, {"star": a["star"][::-1]})
    assert same_objects({}, {})
    assert not same_objects(a, {"star": a["star"][:1]})
    assert not same_objects(a, {"circle": a["star"]})
    assert not same_objects(a, {"star": [a["star"][0], Found((20, 0, 30, 10), 0.8, "red")]})
    assert not same_objects(a, {"star": [a["star"][0], Found((26, 0, 36, 10), 0.8, "blue")]})


def test_overlap_and_psnr():
    assert overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    a = np.zeros((4, 4, 3), np.uint8)
    assert psnr(a, a) == edit_suite.BEST_PSNR and psnr(a, a + 255) == 0
    from skimage.metrics import peak_signal_noise_ratio

    b = np.random.default_rng(0).integers(0, 60, a.shape, np.uint8)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b))
