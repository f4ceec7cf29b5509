"""The rules against a second implementation of the published description, written apart from scoring.py."""

import numpy as np
import pytest

from evaluation.scoring import Found, group, relations, score

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
    include = []
    for i in range(int(rng.integers(1, 4))):
        clause = {"class": str(rng.choice(CLASSES)), "count": int(rng.choice([1, 1, 1, 2, 3]))}
        if rng.random() < 0.3:
            clause["color"] = str(rng.choice(["red", "blue"]))
        if i and rng.random() < 0.5:
            clause["position"] = [str(rng.choice(RELATIONS)), int(rng.integers(i))]
        include.append(clause)
    metadata = {"include": include}
    if rng.random() < 0.4:
        metadata["exclude"] = [
            {"class": str(rng.choice(CLASSES)), "count": int(rng.choice([1, 2, 4, 16, 17]))}
            for _ in range(rng.integers(1, 3))
        ]
    return metadata, detections, float(rng.choice([0.0, 0.3, 0.9]))


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
