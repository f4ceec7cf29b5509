"""The rules against a second implementation of the published description, written apart from scoring.py."""

import itertools

import numpy as np
import pytest

from evaluation.scoring import Found, group, relations, score, score_strictly

CLASSES = ("cat", "dog", "cup")
COLORS = ("red", "blue", None)
RELATIONS = ("left of", "right of", "above", "below")


def double(metadata, detections, threshold):
    """`detections`: list of (class, box, confidence, colour)."""
    table = {}
    for c in CLASSES:
        mine = [d for d in detections if d[0] == c and d[2] > threshold]
        table[c] = sorted(mine, key=lambda d: d[2], reverse=True)[:16]
    ok, chosen = True, {}
    for i, want in enumerate(metadata["include"]):
        top = table[want["class"]][: want["count"]]
        good = len(top) == want["count"]
        if good and "color" in want:
            good = all(d[3] == want["color"] for d in top)
        if good and "position" in want:
            word, j = want["position"]
            good = j in chosen and all(stands(word, a, b) for a in top for b in chosen[j])
        if good:
            chosen[i] = top
        ok &= good
    return ok and not any(len(table[w["class"]]) >= w["count"] for w in metadata.get("exclude", []))


def stands(word, a, b):
    a, b = np.array(a[1], float).reshape(2, 2), np.array(b[1], float).reshape(2, 2)
    gap = a.mean(0) - b.mean(0)
    size = (a[1] - a[0]) + (b[1] - b[0])
    rest = np.where(np.abs(gap) > 0.1 * size, gap - np.sign(gap) * 0.1 * size, 0)
    if (np.abs(rest) < 1e-3).all():
        return False
    unit = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[word]
    return rest @ unit / np.sqrt((gap**2).sum()) > 0.5


def random_case(rng):
    n = int(rng.choice([0, 2, 4, 8, 40]))
    detections = []
    for _ in range(n):
        x, y = rng.uniform(0, 200, 2)
        w, h = rng.uniform(5, 90, 2)
        box = (x, y, x + w, y + h)
        detections.append((str(rng.choice(CLASSES)), box, float(rng.random()), COLORS[rng.integers(3)]))
    metadata = random_metadata(rng, int(rng.integers(1, 4)))
    if rng.random() < 0.4:
        metadata["exclude"] = [
            {"class": str(rng.choice(CLASSES)), "count": int(rng.choice([1, 2, 4, 16, 17]))}
            for _ in range(rng.integers(1, 3))
        ]
    return metadata, detections, float(rng.choice([0.0, 0.3, 0.9]))


def random_metadata(rng, clauses):
    include = []
    for i in range(clauses):
        clause = {"class": str(rng.choice(CLASSES)), "count": int(rng.choice([1, 1, 1, 2, 3]))}
        if rng.random() < 0.3:
            clause["color"] = str(rng.choice(["red", "blue"]))
        if i and rng.random() < 0.5:
            clause["position"] = [str(rng.choice(RELATIONS)), int(rng.integers(i))]
        include.append(clause)
    return {"include": include}


def test_equal_to_an_independent_implementation_on_2000_random_cases():
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(2000):
        metadata, detections, threshold = random_case(rng)
        objects = group([(c, Found(box, p, color)) for c, box, p, color in detections], threshold)
        verdict = score(metadata, objects)
        assert verdict.correct == double(metadata, detections, threshold), (metadata, detections, threshold)
        assert verdict.correct == (not verdict.reasons)
        verdicts.append(verdict.correct)
    assert 200 < sum(verdicts) < 1800


def at(x, y, confidence=0.9, color=None, size=10):
    return Found((x - size / 2, y - size / 2, x + size / 2, y + size / 2), confidence, color)


def test_relations_need_more_than_half_the_distance_after_shrinking():
    target = at(0, 0)
    assert relations(at(-50, 0), target) == {"left of"}
    assert relations(at(40, 40), target) == {"right of", "below"}
    assert relations(at(0, -50), target) == {"above"}
    assert relations(at(1.5, 1.5), target) == set()
    assert relations(target, target) == set()
    assert relations(at(50, 29), target) == {"right of"} and relations(at(50, 33), target) == {"right of", "below"}


@pytest.mark.parametrize("confident, correct", [("red", True), ("blue", False)])
def test_colour_is_asked_of_the_most_confident_objects_only(confident, correct):
    other = "blue" if confident == "red" else "red"
    objects = group([("cup", at(0, 0, 0.5, other)), ("cup", at(40, 0, 0.8, confident))], 0.3)
    assert score({"include": [{"class": "cup", "count": 1, "color": "red"}]}, objects).correct is correct


def test_at_most_16_objects_are_counted():
    crowd = group([("cup", at(20 * i, 0, 0.5 + 0.01 * i)) for i in range(20)], 0.3)
    assert len(crowd["cup"]) == 16 and crowd["cup"][0].confidence == pytest.approx(0.69)
    assert not score({"include": [{"class": "cup", "count": 17}]}, crowd).correct
    assert score({"include": [], "exclude": [{"class": "cup", "count": 17}]}, crowd).correct


def double_strict(metadata, detections, threshold):
    """Try every way of naming the detections after the objects asked for."""
    seen = [d for d in detections if d[2] > threshold]
    slots = [(i, want) for i, want in enumerate(metadata["include"]) for _ in range(want["count"])]
    if len(seen) != len(slots):
        return False
    for order in itertools.permutations(seen):
        given = [(i, want, d) for (i, want), d in zip(slots, order, strict=True)]
        named = all(want["class"] == d[0] and want.get("color", d[3]) == d[3] for _, want, d in given)
        placed = all(
            stands(want["position"][0], d, e)
            for _, want, d in given
            if "position" in want
            for j, _, e in given
            if j == want["position"][1]
        )
        if named and placed:
            return True
    return False


def strict_case(rng):
    """Metadata of up to four objects, and detections that are often what it asks for."""
    metadata = random_metadata(rng, int(rng.integers(1, 3)))
    wanted = [want for want in metadata["include"] for _ in range(want["count"])][:4]
    detections = []
    for want in wanted if rng.random() < 0.9 else wanted[1:]:
        x, y = rng.uniform(0, 200, 2)
        name = want["class"] if rng.random() < 0.95 else str(rng.choice(CLASSES))
        color = want.get("color") if rng.random() < 0.9 else COLORS[rng.integers(3)]
        detections.append((name, (x, y, x + 20, y + 20), float(rng.uniform(0.5, 1)), color or COLORS[rng.integers(3)]))
    if rng.random() < 0.1:
        detections.append((str(rng.choice(CLASSES)), (0, 0, 20, 20), 0.6, "red"))
    return metadata, detections


def test_the_strict_rule_is_equal_to_trying_every_assignment_on_2000_random_cases():
    rng = np.random.default_rng(1)
    verdicts = []
    for _ in range(2000):
        metadata, detections = strict_case(rng)
        objects = group([(c, Found(box, p, color)) for c, box, p, color in detections], 0.3)
        verdict = score_strictly(metadata, objects)
        assert verdict.correct == double_strict(metadata, detections, 0.3), (metadata, detections)
        assert verdict.correct == (not verdict.reasons)
        kinds = [want["class"] for want in metadata["include"]]
        if len(set(kinds)) == len(kinds):
            assert score(metadata, objects).correct >= verdict.correct, "what is strictly right is right for GenEval"
        verdicts.append(verdict.correct)
    assert 400 < sum(verdicts) < 1600


def test_objects_that_nobody_asked_for_are_wrong_by_the_strict_rule_only():
    wanted = {"include": [{"class": "cup", "count": 1, "color": "red"}]}
    alone = [("cup", at(0, 0, color="red"))]
    assert score_strictly(wanted, group(alone, 0.3)).correct
    for extra in ("cup", "dog"):
        crowd = group([*alone, (extra, at(50, 0, 0.5, "red"))], 0.3)
        assert score(wanted, crowd).correct and not score_strictly(wanted, crowd).correct
    assert score_strictly(wanted, {}).reasons == ("expected exactly 1 cup, found 0",)
    pair = {"include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "cup", "count": 1, "color": "blue"}]}
    cups = [("cup", at(0, 0, 0.8, "blue")), ("cup", at(40, 0, 0.9, "red"))]
    assert score_strictly(pair, group(cups, 0.3)).correct
