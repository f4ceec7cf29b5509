"""What a curriculum draws: shares on their curves, nothing below a least score, alike on all ranks, after a resume."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import class_data
import numpy as np
import pytest

from command_line import UserError
from data_pipeline import sample_index
from data_pipeline.class_order import ByClass, Classes
from data_pipeline.classes import SOURCE, TEXT, text_kind
from data_pipeline.dataset import EncodedDataset, MixedData
from data_pipeline.draws import Draws, height
from data_pipeline.loader import Loader
from data_pipeline.order import Mixture

TEXTS = ("none", "none", "none", "none", "words", "words", "sentences", "paragraphs")
DOMAINS = ("nature", "nature", "design", "people", None)
DRAWS = Draws(
    text={"none": [[0, 1], [0.4, 0.7], [1, 0.4]], "words": [[0, 0], [0.4, 0.3], [1, 0.3]],
          "sentences": [[0, 0], [0.4, 0], [1, 0.3]]},
    source={"real": [[0, 0.5], [1, 0.8]], "synthetic": [[0, 0.5], [1, 0.2]]},
    minimum={"clip": [[0, 0.1], [1, 0.6]]},
)  # fmt: skip
STEPS, BATCH = 200, 20


def records() -> list[dict]:
    """400 samples of every kind in each source; synthetic ones have no clip score."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(400):
        text, drawn, domain = TEXTS[i % 8], i % 16 >= 8, DOMAINS[i % 5]
        scores = {} if drawn else {"clip": float(np.float16(rng.uniform(0, 1)))}
        more = {} if domain is None or drawn else {"domain": domain}
        made.append(class_data.record(text, "text" if drawn else "photo", scores=scores, **more))
    return made


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    return EncodedDataset(class_data.write(tmp_path_factory.mktemp("classes") / "a", records()))


def loader(dataset: EncodedDataset, rank: int = 0, ranks: int = 1, draws: Draws = DRAWS) -> Loader:
    order = ByClass([Classes(dataset, draws, "here")], seed=3, length=STEPS * BATCH)
    return Loader(dataset, BATCH, rank, ranks, max_tokens=100, order=order)


def take(source: Loader, steps: int = STEPS) -> list[list]:
    """The samples of each step."""
    found = [[sample for group in next(source) for sample in group] for _ in range(steps)]
    source.close()
    return found


@pytest.fixture(scope="module")
def drawn(dataset: EncodedDataset) -> list[list]:
    return take(loader(dataset))


def names(steps: list[list]) -> list[list[tuple[str, int]]]:
    return [sorted((s.key, s.epoch) for s in step) for step in steps]


@pytest.mark.parametrize("table", ["text", "source"])
def test_shares_follow_their_curves_at_ten_points(drawn: list[list], table: str):
    kind = text_kind if table == "text" else lambda meta: SOURCE[meta["source"] == "text"]
    curves = getattr(DRAWS, table)
    for tenth in range(10):
        samples = [s for step in drawn[tenth * 20 : (tenth + 1) * 20] for s in step]
        found = Counter(kind(s.meta) for s in samples)
        assert found.keys() <= curves.keys()
        for name, points in curves.items():
            wanted = np.mean([height(points, (tenth + f) / 10) for f in np.linspace(0, 1, 101)])
            assert found[name] / len(samples) == pytest.approx(wanted, abs=0.012)


def test_nothing_is_drawn_below_the_moving_threshold(drawn: list[list]):
    lowest = []
    for number, step in enumerate(drawn):
        scores = [s.meta["scores"]["clip"] for s in step if s.meta["scores"]]
        assert min(scores) >= height(DRAWS.minimum["clip"], number / STEPS)
        lowest.append(min(scores))
    assert min(lowest[:40]) < 0.2 and any(not s.meta["scores"] for s in drawn[-1])  # below the last threshold; unscored


def test_every_sample_of_a_class_comes_once_before_one_comes_again(dataset: EncodedDataset):
    steps = take(loader(dataset, draws=Draws(text={"words": 1, "sentences": 1})), 10)
    counts = {name: Counter() for name in ("words", "sentences")}
    for sample in (s for step in steps for s in step):
        counts[text_kind(sample.meta)][sample.key] += 1
    assert [set(c.values()) for c in counts.values()] == [{1}, {2}]  # 100 draws of 100 and of 50 samples


def test_a_resume_goes_on_exactly(dataset: EncodedDataset, drawn: list[list]):
    for stop in (0, 1, 77):
        first = loader(dataset)
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.state_dict()))
        first.close()
        again = loader(dataset)
        again.load_state_dict(state)
        assert names(take(again, 15)) == names(drawn[stop : stop + 15])
    with pytest.raises(ValueError, match="in another order"):
        loader(dataset, draws=Draws(text=DRAWS.text)).load_state_dict(state)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_each_step(dataset: EncodedDataset, drawn: list[list], ranks: int):
    parts = [take(loader(dataset, rank, ranks), 30) for rank in range(ranks)]
    assert names([sum(step, []) for step in zip(*parts, strict=True)]) == names(drawn[:30])


def test_domains_are_shares_of_what_is_real(dataset: EncodedDataset):
    draws = Draws(domain={"nature": 1, "people": 3}, source={"real": 0.9, "synthetic": 0.1})
    found = Counter(
        s.meta.get("domain", s.meta["source"]) for step in take(loader(dataset, draws=draws), 50) for s in step
    )
    assert {name: n / 1000 for name, n in found.items()} == pytest.approx(
        {"nature": 0.225, "people": 0.675, "text": 0.1}, abs=0.002
    )
    natural = Draws(domain={"nature": 1, "people": 3})  # half of the data are drawn
    found = Counter(s.meta["source"] for step in take(loader(dataset, draws=natural), 50) for s in step)
    assert found["text"] == 500


def test_what_is_not_asked_for_stays_as_it_is(dataset: EncodedDataset):
    found = Counter(
        text_kind(s.meta) for step in take(loader(dataset, draws=Draws(source={"real": 1})), 50) for s in step
    )
    assert found == {"none": 500, "words": 250, "sentences": 125, "paragraphs": 125}


@pytest.mark.parametrize(
    "draws, words",
    [
        (dict(domain={"sports": 1}), "sports has a share of 50.0% at 0% of the stage, but here holds no such sample"),
        (
            dict(minimum={"clip": [[0, 0], [1, 2]]}, source={"real": 1}),
            "with clip of at least 0 there and up to the next",
        ),
        (dict(minimum={"taste": 1}), "no sample of here has that score (there are clip)"),
        (dict(text={"nothing": 1}), "unknown name nothing; known are none, words"),
        (dict(text={"none": 0}), "at every moment some share is above 0"),
        (dict(text={"none": [[0.5, 1], [0.2, 1]]}), "is no curve"),
        (dict(text={"none": "much"}), "is no curve"),
        (dict(text={"none": -1}), "shares are at least 0"),
        (dict(text=0.5), "should be a table"),
    ],
)
def test_what_cannot_be_drawn_is_one_clear_line(dataset: EncodedDataset, draws: dict, words: str):
    with pytest.raises(UserError) as error:
        Classes(dataset, Draws(**draws), "here")
    assert words in str(error.value)


def test_shares_that_no_samples_can_have_together_are_refused(tmp_path: Path):
    made = [class_data.record("none"), class_data.record("words", "text")] * 10
    data = EncodedDataset(class_data.write(tmp_path / "a", made))
    with pytest.raises(UserError, match="cannot both hold at 0% of the stage"):
        Classes(data, Draws(text={"none": 1, "words": 1}, source={"real": 0.2, "synthetic": 0.8}), "here")


def test_kinds_of_text():
    wanted = {"": "none", " \n": "none", "Grand opening": "words", "春" * 12: "words", "春" * 13: "sentences"}
    wanted |= {"x" * 160: "sentences", "x" * 161: "paragraphs"}
    assert {text: text_kind({"lines": [{"text": text}]}) for text in wanted} == wanted


def test_records_of_other_forms_have_no_text():
    for lines in (None, "text", ["text"], [{"text": 3}], [{}]):
        assert text_kind({"lines": lines}) == "none"


def test_the_index_knows_classes_and_an_older_one_is_made_anew(tmp_path: Path):
    folders = [tmp_path / "a", tmp_path / "b"]
    class_data.write(folders[0], [class_data.record("words", "scene", domain="people")] * 5)
    class_data.write(folders[1], [class_data.record(domain="art"), class_data.record("words", domain="people")] * 5)
    file = folders[1] / sample_index.INDEX
    EncodedDataset(folders)
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"format": "3"', b'"format": "2"').replace(b'"kind"', b'"dink"'))
    data = EncodedDataset(folders)
    assert file.read_bytes() == whole
    names, numbers = data.domains()
    assert [names[n] for n in numbers] == ["people"] * 5 + [
        "art" if TEXT[k % 4] == "none" else "people" for k in data.column("kind")[5:]
    ]
    assert [SOURCE[k // 4] for k in data.column("kind")] == ["synthetic"] * 5 + ["real"] * 10


def test_a_batch_of_tokens(dataset: EncodedDataset):
    order = ByClass([Classes(dataset, DRAWS, "here")], 3, 50 * 400, tokens=lambda part, i: int(dataset.tokens[i]))
    steps = take(Loader(dataset, 1, max_tokens=100, order=order, batch_tokens=400), 50)
    tokens = [sum(len(s.txt) + 1 for s in step) for step in steps]
    assert max(abs(n - 400) for n in tokens) <= 2 and np.mean(tokens) == pytest.approx(400, rel=0.003)
    early, late = (np.mean([text_kind(s.meta) == "none" for s in step]) for step in (steps[0], steps[-1]))
    assert early > 0.98 and late == pytest.approx(0.4, abs=0.03)
    with pytest.raises(ValueError, match="may leave some of the 8 data-parallel ranks without a sample"):
        Loader(dataset, 1, 0, 8, max_tokens=100, batch_tokens=20)


def test_resolutions_get_their_shares_of_compute(tmp_path: Path):
    sides = (4, 8)
    shapes = [lambda i: (2 * sides[0], 2 * sides[0], 1 + i % 30), lambda i: (2 * sides[1], 2 * sides[1], 1 + i % 7)]
    folders = [
        class_data.write(tmp_path / str(side), records()[:80], resolution=16 * side, shape=shape)
        for side, shape in zip(sides, shapes, strict=True)
    ]
    parts = [EncodedDataset(folder) for folder in folders]
    mixed = MixedData(parts, Mixture.SOURCE)
    cost = lambda part, i: float(parts[part].tokens[i]) ** 2  # noqa: E731
    classes = [Classes(part, Draws(text={"none": 1, "words": 1}), "here") for part in parts]
    curves = (((0.0, 1.0), (1.0, 0.5)), ((0.0, 0.0), (1.0, 0.5)))

    def drawn(curves) -> np.ndarray:
        """Compute of each resolution in each of 100 steps."""
        order = ByClass(classes, 3, 2000, curves, cost)
        places = iter(Loader(mixed, 20, order=order, max_tokens=10**4)._steps(order.first, None))
        found = np.zeros((100, 2))
        for step in range(100):
            for sample in (s for group in next(places)[2] for s in group):
                found[step, sides.index(sample.latent.shape[-1] // 2)] += (
                    len(sample.txt) + sample.latent[0].numel() // 4
                ) ** 2
        return found

    order = ByClass(classes, 3, 2000, (((0.0, 1.0),),) * 2, cost)
    with pytest.raises(ValueError, match="without a sample, of which one has 71: raise --batch-tokens"):
        next(Loader(mixed, 20, 0, 8, order=order, max_tokens=10**4, batch_tokens=60))

    even = drawn((((0.0, 1.0),),) * 2).sum(0)
    assert even[0] / even.sum() == pytest.approx(0.5, abs=0.01)
    moving = drawn(curves)
    for tenth in range(10):
        part = moving[tenth * 10 : (tenth + 1) * 10].sum(0)
        assert part[1] / part.sum() == pytest.approx((tenth + 0.5) / 20, abs=0.02)


def test_curves():
    points = ((0.2, 1.0), (0.6, 3.0), (1.0, 3.0))
    assert [height(points, f) for f in (0, 0.2, 0.4, 0.6, 0.9, 1)] == pytest.approx([1, 1, 2, 3, 3, 3])
    assert Draws(text={"none": points}).fractions() == (0.0, 0.2, 0.6, 1.0)
    assert all(b >= a for a, b in pairwise([height(points, f) for f in np.linspace(0, 1, 999)]))
