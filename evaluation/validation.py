"""A small validation that trainers call on their moving average: a few frozen prompts, judged at once."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

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

    def score(self, images: list[np.ndarray]) -> dict[str, Any]:
        """Judge the uint8 pictures [h, w, 3] of all texts.

        Returns {"strict", "strict_low", "strict_high"} (the judge's strict verdicts: mean over tags with its 95 %
        interval, clustered by prompt), {"strict_floor"} (of the best constant picture), the same for "official",
        GenEval's rule, {"reward"} (by the reward's detector), {"strict/TAG"}, {"n"} pictures, and {"each"}: prompt, tag
        and verdicts of every picture.
        """
        rows = self._suite.score(images, self._prompts)
        names, strata = [p.id for p in self._prompts], [p.stratum for p in self._prompts]
        size, result = images[0].shape[:2], {"n": len(images)}
        for rule in ("strict", "official"):
            judged = estimate(Scores(rows[rule], names, strata), self._suite.bounds[rule])
            result |= {rule: judged.value, f"{rule}_low": judged.low, f"{rule}_high": judged.high}
            result[f"{rule}_floor"] = _floor(self._suite.split, rule, len(set(names)), size)
        result["reward"] = estimate(Scores(rows["reward"], names, strata), self._suite.bounds["reward"]).value
        for tag in dict.fromkeys(strata):
            values = [v for v, s in zip(rows["strict"], strata, strict=True) if s == tag]
            result[f"strict/{tag}"] = sum(values) / len(values)
        judged = {rule: rows[rule] for rule in ("strict", "official", "reward")}
        return {**result, "each": {"prompt": names, "stratum": strata, **judged}}


class WholeShapesValidation(ShapesValidation):
    """All 200 prompts of the validation split, four pictures each, seeds in common: enough to tell a tenth's gain."""

    def __init__(self):
        super().__init__(n=200, seeds=range(4))


@functools.cache
def _floor(split: str, rule: str, n: int, size: tuple[int, int]) -> float:
    """What the best constant picture gets on the first `n` prompts."""
    suite = ShapesSuite(split)
    prompts = suite.prompts[:n]
    values = suite.score([suite.constants(size)[rule]] * n, prompts)[rule]
    return estimate(Scores(values, [p.id for p in prompts], [p.stratum for p in prompts])).value


def score(
    generate: Generate, split: str = "validation", n: int | None = None, seeds: Sequence[int] = (0,)
) -> dict[str, Any]:
    """Scores of whatever draws: the first `n` prompts of a split, each with every seed (see `ShapesValidation`)."""
    validation = ShapesValidation(split, n, seeds)
    return validation.score(generate(validation.texts, validation.seeds))
