"""Is a picture what its prompt asks for, by the objects that a detector found? Two rules, whatever the detector.

`score_strictly`: exactly the objects asked for, in number, kind, colour and relation, and no others.

`score`, GenEval's (arXiv 2310.11513): what is asked for is among the objects. Others may stand beside it, so a constant
picture that shows a little of everything is right for many prompts. This is the official rule: include clauses AND,
exclude clauses OR; at most 16 objects of a class; colour and position are asked of the `count` most confident objects
of the class; an offset between box centres, shrunk by .1 of the boxes' sizes, must be more than .5 of the distance in
the direction of the relation.
"""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from typing import Any

MAX_OBJECTS = 16
SIZE_SHARE = 0.1
RELATION_THRESHOLD = 0.5


@dataclass(frozen=True)
class Found:
    """An object: box [x0, y0, x1, y1] in pixels, the detector's confidence, its colour if it was named."""

    box: tuple[float, float, float, float]
    confidence: float
    color: str | None = None


Objects = dict[str, list[Found]]
"""Objects by class, most confident first."""


@dataclass(frozen=True)
class Verdict:
    """Whether a picture is right, and everything that is wrong with it."""

    correct: bool
    reasons: tuple[str, ...]


def group(found: list[tuple[str, Found]], threshold: float) -> Objects:
    """The objects above a confidence, by class, the 16 most confident of each."""
    objects: Objects = {}
    for name, f in sorted(found, key=lambda named: -named[1].confidence):
        if f.confidence > threshold:
            objects.setdefault(name, []).append(f)
    return {name: group[:MAX_OBJECTS] for name, group in objects.items()}


def relations(a: Found, b: Found) -> set[str]:
    """Where a lies relative to b: a subset of left of, right of, above, below."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.box, b.box
    dx, dy = (ax0 + ax1 - bx0 - bx1) / 2, (ay0 + ay1 - by0 - by1) / 2
    distance = math.hypot(dx, dy)
    x = _shrink(dx, SIZE_SHARE * (abs(ax1 - ax0) + abs(bx1 - bx0)))
    y = _shrink(dy, SIZE_SHARE * (abs(ay1 - ay0) + abs(by1 - by0)))
    if abs(x) < 1e-3 and abs(y) < 1e-3:
        return set()
    along = {"left of": -x / distance, "right of": x / distance, "above": -y / distance, "below": y / distance}
    return {name for name, share in along.items() if share > RELATION_THRESHOLD}


def _shrink(value: float, by: float) -> float:
    return math.copysign(max(abs(value) - by, 0.0), value)


def score(metadata: dict[str, Any], objects: Objects) -> Verdict:
    """Judge a picture's objects by its prompt's GenEval metadata, by GenEval's rule."""
    reasons: list[str] = []
    matched: list[list[Found] | None] = []
    for clause in metadata.get("include", []):
        failure, candidates = _include(clause, objects, matched)
        matched.append(None if failure else candidates)
        if failure:
            reasons.append(failure)
    for clause in metadata.get("exclude", []):
        if (found := len(objects.get(clause["class"], []))) >= clause["count"]:
            reasons.append(f"expected fewer than {clause['count']} {clause['class']}, found {found}")
    return Verdict(not reasons, tuple(reasons))


def _include(
    clause: dict[str, Any], objects: Objects, matched: list[list[Found] | None]
) -> tuple[str | None, list[Found]]:
    """(what is wrong or None, the objects that the clause is about)."""
    name, count = clause["class"], clause["count"]
    candidates = objects.get(name, [])[:count]
    if len(candidates) < count:
        return f"expected {count} {name}, found {len(candidates)}", candidates
    if "color" in clause:
        right = sum(f.color == clause["color"] for f in candidates)
        if right < count:
            return f"expected {count} {clause['color']} {name}, found {right}", candidates
    if "position" in clause:
        relation, target = clause["position"]
        if matched[target] is None:
            return f"no object for {name} to be {relation}", candidates
        if not all(relation in relations(f, t) for f in candidates for t in matched[target]):
            return f"expected {name} {relation} its target, it isn't", candidates
    return None, candidates


def score_strictly(metadata: dict[str, Any], objects: Objects) -> Verdict:
    """Judge a picture's objects by its prompt's GenEval metadata, by the strict rule.

    Each object found must be one that was asked for, and each that was asked for must be found: clauses share out the
    objects so that every one of them holds. Relations are GenEval's, colour is asked of all objects of a clause.
    """
    clauses = metadata.get("include", [])
    asked: Counter[str] = Counter()
    for clause in clauses:
        asked[clause["class"]] += clause["count"]
    found = {name: len(group) for name, group in objects.items()}
    reasons = [
        f"expected exactly {asked[name]} {name}, found {found.get(name, 0)}"
        for name in dict.fromkeys([*asked, *found])
        if asked[name] != found.get(name, 0)
    ]
    if not reasons and not _shared_out(clauses, objects, []):
        reasons.append("the objects asked for, but not in the colours and relations asked for")
    return Verdict(not reasons, tuple(reasons))


def _shared_out(clauses: list[dict[str, Any]], left: Objects, chosen: list[tuple[Found, ...]]) -> bool:
    """Whether the clauses after those that have `chosen` their objects can share the ones that are left."""
    if len(chosen) == len(clauses):
        return True
    clause = clauses[len(chosen)]
    name = clause["class"]
    for mine in combinations(left.get(name, []), clause["count"]):
        if "color" in clause and any(f.color != clause["color"] for f in mine):
            continue
        if "position" in clause:
            relation, target = clause["position"]
            if not all(relation in relations(f, t) for f in mine for t in chosen[target]):
                continue
        rest = [f for f in left.get(name, []) if all(f is not m for m in mine)]
        if _shared_out(clauses, {**left, name: rest}, [*chosen, mine]):
            return True
    return False
