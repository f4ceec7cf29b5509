"""Search for the best constant picture, whose score is the floor of the shapes suites (minutes).

python -m evaluation.constant_search --split test-iid
"""

import functools
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

try:
    from command_line import run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

if TYPE_CHECKING:
    from evaluation.suites import ShapesSuite


@dataclass(frozen=True)
class ConstantConfig:
    split: Literal["validation", "test-iid", "test-compositional"] = "test-iid"
    restarts: int = 9
    side_px: int = 96
    """Side of the pictures."""
    seed: int = 0


def main(config: ConstantConfig) -> None:
    from evaluation.constant_pictures import BEST, RULES, best_constant
    from evaluation.intervals import Scores, estimate
    from evaluation.suites import ShapesSuite

    suite = ShapesSuite(config.split)
    for rule in RULES:
        value, cells = search(value_of(suite, rule, config.side_px), config.seed, config.restarts)
        BEST[config.split, rule] = ", ".join(cells)
        picture = best_constant(config.split, rule, (config.side_px, config.side_px))
        rows = suite.score([picture] * len(suite.prompts), suite.prompts)[rule]
        scores = Scores(rows, [p.id for p in suite.prompts], [p.stratum for p in suite.prompts])
        print(f"{rule}: {value:.3f} by its true objects, {estimate(scores).value:.3f} judged: {', '.join(cells)}")


def search(value: Callable[[tuple[str, ...]], float], seed: int, restarts: int) -> tuple[float, tuple[str, ...]]:
    """(value, places) of the best picture: from random beginnings, change one shape or colour at a time if it helps."""
    import numpy as np

    from data_pipeline.synthesis.shapes_world import COLORS, SHAPES
    from evaluation.constant_pictures import PLACES

    rng = np.random.default_rng(seed)
    best = (-1.0, ("-",) * PLACES)
    for restart in range(restarts):
        cells = ["-"] * PLACES
        for place in rng.permutation(PLACES)[: PLACES - restart % PLACES]:
            cells[place] = f"{rng.choice(list(COLORS))} {rng.choice(SHAPES)}"
        reached, improved = value(tuple(cells)), True
        while improved:
            improved = False
            for place in rng.permutation(PLACES):
                color, shape = (
                    (rng.choice(list(COLORS)), rng.choice(SHAPES)) if cells[place] == "-" else cells[place].split()
                )
                options = ["-", *(f"{color} {s}" for s in SHAPES), *(f"{c} {shape}" for c in COLORS)]
                tried = [(value((*cells[:place], o, *cells[place + 1 :])), o) for o in options]
                most = max(tried, key=lambda t: t[0])
                if most[0] > reached + 1e-9:
                    (reached, cells[place]), improved = most, True
        best = max(best, (reached, tuple(cells)))
    return best


def value_of(suite: "ShapesSuite", rule: str, side_px: int) -> Callable[[tuple[str, ...]], float]:
    """Score of a constant picture, mean over tags, by what a perfect detector finds in it."""
    from evaluation.constant_pictures import placed
    from evaluation.scoring import score, score_strictly
    from evaluation.suites import true_objects

    tags = Counter(p.stratum for p in suite.prompts)
    asked: dict[str, tuple[dict[str, Any], float]] = {}
    for p in suite.prompts:
        meaning = {key: p.metadata[key] for key in ("include", "exclude") if key in p.metadata}
        name = json.dumps(meaning, sort_keys=True)
        asked[name] = meaning, asked.get(name, (meaning, 0.0))[1] + 1 / tags[p.stratum] / len(tags)
    verdict = {"official": score, "strict": score_strictly}[rule]

    @functools.cache
    def value(cells: tuple[str, ...]) -> float:
        objects = true_objects(placed(cells, (side_px, side_px)))
        return math.fsum(weight for meaning, weight in asked.values() if verdict(meaning, objects).correct)

    return value


if __name__ == "__main__":
    run(main, ConstantConfig)
