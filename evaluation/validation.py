"""A small validation that trainers call on their moving average: a few frozen prompts, judged at once."""

from collections.abc import Callable, Sequence

import numpy as np

from evaluation.intervals import Scores, estimate
from evaluation.suites import ShapesSuite

PROMPTS = 48

Generate = Callable[[list[str], list[int]], list[np.ndarray]]
"""generate(prompts, seeds): uint8 [h, w, 3] pictures, one for each pair."""


class ShapesValidation:
    """The first prompts of a split of the shapes world, judged; what `training.hooks.Validation` asks for.

    Raises ValueError for fewer than two prompts.
    """

    def __init__(self, split: str = "validation", n: int | None = None, seeds: Sequence[int] | None = None):
        """Every prompt is drawn with each of `seeds`; by default the i-th prompt with seed i."""
        self._suite = ShapesSuite(split)
        prompts = self._suite.prompts[: n or PROMPTS]
        if len(prompts) < 2 or (seeds is not None and not seeds):
            raise ValueError(f"validation needs two prompts and a seed at least, got {len(prompts)} and {seeds}")
        drawn = [(p, s) for i, p in enumerate(prompts) for s in ([i] if seeds is None else seeds)]
        self._prompts, self.seeds = [p for p, _ in drawn], [s for _, s in drawn]
        self.texts = [p.text for p in self._prompts]

    def score(self, images: list[np.ndarray]) -> dict[str, float]:
        """Judge the uint8 pictures [h, w, 3] of all texts.

        Returns {"judge", "judge_low", "judge_high"} (mean over tags with its 95 % interval, clustered by prompt),
        {"reward"} (the same by the reward's detector) and {"judge/TAG"}.
        """
        rows = self._suite.score(images, self._prompts)
        names, strata = [p.id for p in self._prompts], [p.stratum for p in self._prompts]
        judged = estimate(Scores(rows["judge"], names, strata), self._suite.bounds)
        result = {"judge": judged.value, "judge_low": judged.low, "judge_high": judged.high}
        result["reward"] = estimate(Scores(rows["reward"], names, strata), self._suite.bounds).value
        for tag in dict.fromkeys(strata):
            values = [v for v, s in zip(rows["judge"], strata, strict=True) if s == tag]
            result[f"judge/{tag}"] = sum(values) / len(values)
        return result


def score(
    generate: Generate, split: str = "validation", n: int | None = None, seeds: Sequence[int] = (0,)
) -> dict[str, float]:
    """Scores of whatever draws: the first `n` prompts of a split, each with every seed (see `ShapesValidation`)."""
    validation = ShapesValidation(split, n, seeds)
    return validation.score(generate(validation.texts, validation.seeds))
