import numpy as np
import pytest

from command_line import UserError
from data_pipeline.synthesis import shape_edits
from data_pipeline.synthesis import shapes_world as world
from evaluation import edit_suite
from evaluation.edit_suite import EditSuite, is_carried_out, overlap, psnr
from evaluation.judge import Judge
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


def test_what_stays_must_have_its_class_colour_and_place():
    a = {"star": [Found((0, 0, 10, 10), 0.9, "red"), Found((20, 0, 30, 10), 0.8, "blue")]}
    same = lambda found: is_carried_out("recolor", found, {}, a, (40, 40))  # noqa: E731
    assert same({"star": a["star"][::-1]})
    assert not same({"star": a["star"][:1]})
    assert not same({"circle": a["star"]})
    assert not same({"star": [a["star"][0], Found((20, 0, 30, 10), 0.8, "red")]})
    assert not same({"star": [a["star"][0], Found((26, 0, 36, 10), 0.8, "blue")]})
    assert is_carried_out("remove", {}, a, {}, (40, 40))


def test_moving_means_another_place_in_the_corner_of_the_same_size():
    stays = [Found((60, 60, 80, 80), 0.9, "blue")]
    before = {"star": [Found((20, 20, 40, 40), 0.9, "red")], "circle": stays}
    after = {"star": [Found((5, 5, 25, 25), 0.9, "red")], "circle": stays}

    def moved(x, y, size=20, others=stays):
        star = Found((x, y, x + size, y + size), 0.9, "red")
        return is_carried_out("move", {"star": [star], "circle": others}, before, after, (100, 100))

    assert moved(5, 5) and moved(0, 20) and moved(12, 4)
    assert not moved(20, 20), "it didn't move"
    assert not moved(5, 70) and not moved(5, 40), "another corner, or none"
    assert not moved(5, 5, size=40) and not moved(5, 5, others=[Found((30, 60, 50, 80), 0.9, "blue")])


@pytest.mark.parametrize("operation", ["move", "add"])
def test_every_valid_place_is_right(operation):
    size, tried = (96, 96), 0
    judge = Judge()
    for seed in range(160):
        rng = np.random.default_rng([9, seed])
        objects = shape_edits._draw_objects(rng, size)
        edited = shape_edits._edit(rng, operation, objects, size)
        if edited is None:
            continue
        after, instruction, _ = edited
        new = next(o for o in after if o not in objects)
        zone = next(z for z in shape_edits.ZONES if z in instruction)
        others = [o for o in after if o is not new]
        again = shape_edits._put(rng, new, others, size, zone)
        old = next((o for o in objects if o not in after), None)
        if again is None or (old is not None and np.hypot(again.x - old.x, again.y - old.y) < 0.3 * min(size)):
            continue
        pictures = [world.draw(o, (250, 250, 250), size) for o in (objects, after, [*others, again])]
        found = judge(pictures)
        assert is_carried_out(operation, found[2], *found[:2], size), seed
        assert not is_carried_out(operation, found[0], *found[:2], size), "unedited"
        tried += 1
    assert tried > 15


def test_no_training_edit_shows_the_objects_of_a_measured_one(suite):
    def objects_of(described):
        return frozenset(described.split(" on a ")[0].replace("an ", "a ").split(" and "))

    measured = {objects_of(e.record["before"]) for e in suite.edits.values()}
    rng = np.random.default_rng(0)
    for _ in range(400):
        record = shape_edits.draw_edit(rng, 32).record
        assert not {objects_of(record["before"]), objects_of(record["after"])} & measured
    placed = [shape_edits._draw_objects(rng, (64, 64)) for _ in range(400)]
    assert 0.05 < np.mean([shape_edits.is_held_out(p) for p in placed]) < 0.16
    assert shape_edits.is_held_out(placed[0]) == shape_edits.is_held_out(placed[0][::-1])


def test_overlap_and_psnr():
    assert overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    a = np.zeros((4, 4, 3), np.uint8)
    assert psnr(a, a) == edit_suite.BEST_PSNR and psnr(a, a + 255) == 0
    from skimage.metrics import peak_signal_noise_ratio

    b = np.random.default_rng(0).integers(0, 60, a.shape, np.uint8)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b))
