"""Intervals of scores and of differences: bootstrap over prompts, which are what was sampled.

Pictures of one prompt are alike, so they are drawn together (a prompt is a cluster, and prompts weigh the same). A
stratified score, such as GenEval's mean over tags, is the mean over strata of the mean over their prompts, and prompts
are drawn within their stratum, n - 1 of n (Rao & Wu 1988), which makes the variance unbiased however few they are. The
ends are percentiles at Student-t levels (Hesterberg 2015, section 3.4), with Satterthwaite's degrees of freedom.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

REPEATS = 10_000
ALPHA = 0.05


@dataclass(frozen=True)
class Scores:
    """One number per picture: equal-length lists of values, the prompts they belong to, and the prompts' strata."""

    values: Sequence[float]
    prompts: Sequence[str]
    strata: Sequence[str] | None = None

    def __post_init__(self):
        lengths = {len(self.values), len(self.prompts), len(self.prompts if self.strata is None else self.strata)}
        if lengths == {0} or len(lengths) > 1:
            raise ValueError(
                f"scores need equally many values, prompts and strata, at least one; got {sorted(lengths)}"
            )

    def prompt_means(self) -> list[np.ndarray]:
        """The mean of each prompt, by stratum, both in order of their names."""
        strata = self.strata if self.strata is not None else [""] * len(self.values)
        pictures: dict[tuple[str, str], list[float]] = {}
        for stratum, prompt, value in zip(strata, self.prompts, self.values, strict=True):
            pictures.setdefault((stratum, prompt), []).append(float(value))
        means: dict[str, list[float]] = {}
        for stratum, prompt in sorted(pictures):
            means.setdefault(stratum, []).append(math.fsum(pictures[stratum, prompt]) / len(pictures[stratum, prompt]))
        return [np.array(m) for m in means.values()]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, from `n` pictures of `prompts` prompts; nan where there is too little to tell."""

    value: float
    low: float
    high: float
    n: int
    prompts: int

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0 (of a difference)."""
        return self.low > 0 or self.high < 0


def estimate(scores: Scores, bounds: tuple[float, float] | None = None, seed: int = 0) -> Estimate:
    """The score with its interval; `bounds` are the least and greatest possible value, if there are any.

    If the score is at a bound, resampling sees no spread: the other end is then the exact binomial one
    (Clopper & Pearson 1934) for as many prompts. With a single prompt in a stratum the interval is nan.
    """
    groups = scores.prompt_means()
    value = _mean(groups)
    n, prompts = len(scores.values), sum(map(len, groups))
    if bounds is not None and value in bounds:
        reach = (bounds[1] - bounds[0]) * (1 - (ALPHA / 2) ** (1 / prompts))
        low, high = (value, value + reach) if value == bounds[0] else (value - reach, value)
        return Estimate(value, low, high, n, prompts)
    return Estimate(value, *_interval([(groups, 1)], seed), n, prompts)


def difference(a: Scores, b: Scores, paired: bool, seed: int = 0) -> Estimate:
    """Score of b minus score of a.

    `paired`: both have the same prompts in the same order (the same prompts and seeds), and prompts are drawn for both
    at once. Raises ValueError if they haven't.
    """
    if not paired:
        sides = [(b.prompt_means(), 1), (a.prompt_means(), -1)]
        value = _mean(sides[0][0]) - _mean(sides[1][0])
        n, prompts = len(a.values) + len(b.values), sum(len(g) for groups, _ in sides for g in groups)
        return Estimate(value, *_interval(sides, seed), n, prompts)
    if list(a.prompts) != list(b.prompts) or list(a.strata or []) != list(b.strata or []):
        raise ValueError("a paired comparison needs the same prompts on both sides, in the same order")
    both = Scores([float(y) - float(x) for x, y in zip(a.values, b.values, strict=True)], a.prompts, a.strata)
    groups = both.prompt_means()
    return Estimate(_mean(groups), *_interval([(groups, 1)], seed), len(a.values), sum(map(len, groups)))


def _mean(groups: list[np.ndarray]) -> float:
    return math.fsum(g.mean() for g in groups) / len(groups)


def _interval(sides: list[tuple[list[np.ndarray], int]], seed: int) -> tuple[float, float]:
    """Interval of a signed sum of stratified means."""
    rng = np.random.default_rng(seed)
    draws = np.zeros(REPEATS)
    variances, freedom = [], []
    for groups, sign in sides:
        for g in groups:
            m = len(g)
            if m < 2:
                return math.nan, math.nan
            draws += sign * g[rng.integers(0, m, (REPEATS, m - 1))].mean(1) / len(groups)
            variances.append(g.var(ddof=1) / m / len(groups) ** 2)
            freedom.append(m - 1)
    v = np.array(variances)
    if v.sum() == 0:
        return float(draws[0]), float(draws[0])
    df = v.sum() ** 2 / (v**2 / np.array(freedom)).sum()
    level = stats.norm.cdf(stats.t.ppf(ALPHA / 2, df))
    low, high = np.quantile(draws, [level, 1 - level])
    return float(low), float(high)
