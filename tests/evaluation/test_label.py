import json

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from command_line import UserError
from data_pipeline.synthesis import shapes_world
from evaluation.agreement import agreement, cohen_kappa
from evaluation.label import LabelConfig, main
from evaluation.prompts import shapes_prompts
from evaluation.runner import write_picture


def test_kappa_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.random((2, 50)) < rng.random((2, 1))
        assert cohen_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b), nan_ok=True)


def test_agreement_has_intervals_over_prompts():
    rng = np.random.default_rng(1)
    labels = rng.random(200) < 0.5
    verdicts = np.where(rng.random(200) < 0.9, labels, ~labels)
    found = agreement(labels.tolist(), verdicts.tolist(), [str(i // 2) for i in range(200)])
    assert found.share[0] == (labels == verdicts).mean() and found.n == 200
    for value, low, high in (found.share, found.kappa):
        assert low < value < high and high - low < 0.3
    perfect = agreement([True, False] * 10, [True, False] * 10, [str(i) for i in range(20)])
    assert perfect.kappa[0] == 1
    with pytest.raises(ValueError, match="as many labels"):
        agreement([True], [True, False], ["a"])


@pytest.fixture
def evaluation(tmp_path):
    """Pictures of two models: one draws every prompt right, one nothing."""
    for prompt in shapes_prompts("validation")[:12]:
        rng, name = np.random.default_rng(0), prompt.id.replace("/", "-")
        for model in ("shapes-validation-good", "shapes-validation-bad"):
            (tmp_path / "cache" / model).mkdir(parents=True, exist_ok=True)
            picture = shapes_world.render(prompt.metadata, rng, (64, 64))
            blank = np.full_like(picture, 200)
            write_picture(tmp_path / "cache" / model / f"{name}-0.png", picture if "good" in model else blank)
    return tmp_path


def test_pictures_are_labelled_blind_and_compared(evaluation, tmp_path, capsys):
    output = tmp_path / "labels"
    main(LabelConfig(evaluation, output, count=16))
    items = json.loads((output / "items.json").read_text())
    models = [item["model"] for item in items]
    assert len(items) == 16 and models.count("shapes-validation-good") == 8 and models != sorted(models)
    page = (output / "index.html").read_text()
    assert page.count("data:image/jpeg") == 16 and "good" not in page and "bad" not in page
    labels = ["y" if "good" in m else "n" for m in models]
    labels[0], labels[1] = "u", None
    (output / "labels.json").write_text(json.dumps(labels))
    main(LabelConfig(output=output, labels=output / "labels.json"))
    out = capsys.readouterr().out
    assert "14 labelled" in out and out.count("agrees on 1.000") == 3


def test_bad_labels_are_named(evaluation, tmp_path):
    with pytest.raises(UserError, match="no pictures in"):
        main(LabelConfig(tmp_path / "nowhere"))
    main(LabelConfig(evaluation, tmp_path / "labels", count=4))
    (tmp_path / "wrong.json").write_text('["y"]')
    with pytest.raises(UserError, match="each of 4 pictures"):
        main(LabelConfig(output=tmp_path / "labels", labels=tmp_path / "wrong.json"))
