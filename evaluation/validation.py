"""A small validation that trainers call on their moving average: a few frozen prompts, judged at once."""

from collections.abc import Callable, Sequence

import numpy as np

from evaluation.intervals import Scores, estimate
from evaluation.suites import ShapesSuite

Generate = Callable[[list[str], list[int]], list[np.ndarray]]
"""generate(prompts, seeds): uint8 [h, w, 3] pictures, one for each pair."""


def score(generate: Generate, split: str = "validation", n: int = 48, seeds: Sequence[int] = (0,)) -> dict[str, float]:
    """Draw the first `n` prompts of a split of the shapes world with each seed, and judge the pictures.

    Returns {"judge", "judge_low", "judge_high"} (mean over tags with its 95 % interval, clustered by prompt),
    {"reward"} (the same by the reward's detector) and {"judge/TAG"}. Raises ValueError for fewer than two prompts.
    """
    suite = ShapesSuite(split)
    prompts = suite.prompts[:n]
    if len(prompts) < 2 or not seeds:
        raise ValueError(f"validation needs two prompts and a seed at least, got {len(prompts)} and {len(seeds)}")
    drawn = [(p, seed) for p in prompts for seed in seeds]
    images = generate([p.text for p, _ in drawn], [seed for _, seed in drawn])
    rows = suite.score(images, [p for p, _ in drawn])
    names, strata = [p.id for p, _ in drawn], [p.stratum for p, _ in drawn]
    judged = estimate(Scores(rows["judge"], names, strata), suite.bounds)
    result = {"judge": judged.value, "judge_low": judged.low, "judge_high": judged.high}
    result["reward"] = estimate(Scores(rows["reward"], names, strata), suite.bounds).value
    for tag in dict.fromkeys(strata):
        values = [v for v, s in zip(rows["judge"], strata, strict=True) if s == tag]
        result[f"judge/{tag}"] = sum(values) / len(values)
    return result
