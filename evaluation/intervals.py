"""Intervals of scores and of differences, over prompts, which are what was sampled.

Pictures of one prompt are alike, so a prompt counts as one number, the mean of its pictures (a cluster; prompts weigh
the same). A stratified score, such as GenEval's mean over tags, is the mean over strata of the mean over their prompts.

Scores v between two bounds get the exact binomial interval (Clopper & Pearson 1934) for the number of independent
verdicts that would scatter as much as the score does (Korn & Graubard 1998): v (1 - v) / variance, less what the few
degrees of freedom of the variance (Satterthwaite) leave open. Each stratum's variance counts one more prompt, of
variance v (1 - v), so that a stratum without spread doesn't pass for certain. A score at its bound, where nothing
scatters, gets the least that the strata's numbers of prompts leave possible. Differences of verdicts are those of two
such shares, prompts that got better and prompts that got worse, put together by MOVER (Zou & Donner 2008). What has no
bounds, and paired differences of what isn't a verdict, gets Student's interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

ALPHA = 0.05
Bounds = tuple[float, float]
Groups = list[np.ndarray]
"""Means of the prompts, by stratum."""
Ends = tuple[float, float]


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
        """Whether the interval leaves out 0 (of one difference; for several see `holm`)."""
        return self.low > 0 or self.high < 0


def estimate(scores: Scores, bounds: Bounds | None = None, alpha: float = ALPHA) -> Estimate:
    """The score with its interval; `bounds` are the least and greatest possible value, if there are any.

    Bounds below and above 0 are those of a difference. With a single prompt in a stratum the interval is nan.
    """
    groups = scores.prompt_means()
    value = _mean(groups)
    if bounds is not None and bounds[0] < 0:
        low, high = _of_difference(groups, scores.values, bounds[1], alpha)
    elif bounds is not None:
        scale = bounds[1] - bounds[0]
        ends = _of_share([(g - bounds[0]) / scale for g in groups], alpha)
        low, high = (bounds[0] + scale * end for end in ends)
    else:
        low, high = _students(groups, alpha)
    return Estimate(value, low, high, len(scores.values), sum(map(len, groups)))


def difference(a: Scores, b: Scores, paired: bool, bounds: Bounds | None = None, alpha: float = ALPHA) -> Estimate:
    """Score of b minus score of a; `bounds` are those of either.

    `paired`: both have the same prompts in the same order (the same prompts and seeds). Raises ValueError if they
    haven't.
    """
    if not paired:
        before, after = a.prompt_means(), b.prompt_means()
        n, prompts = len(a.values) + len(b.values), sum(map(len, before + after))
        low, high = _of_two(before, after, bounds, alpha)
        return Estimate(_mean(after) - _mean(before), low, high, n, prompts)
    if list(a.prompts) != list(b.prompts) or list(a.strata or []) != list(b.strata or []):
        raise ValueError("a paired comparison needs the same prompts on both sides, in the same order")
    changes = [float(y) - float(x) for x, y in zip(a.values, b.values, strict=True)]
    reach = None if bounds is None else bounds[1] - bounds[0]
    return estimate(Scores(changes, a.prompts, a.strata), None if reach is None else (-reach, reach), alpha)


def p_value(a: Scores, b: Scores, paired: bool, bounds: Bounds | None = None) -> float:
    """Two-sided p-value of no difference: the least alpha at which the interval leaves out 0; nan without interval."""

    def nearest_end(log_alpha: float) -> float:
        """Of the interval, the end on the side of 0, counted from 0; above 0 if the interval leaves 0 out."""
        e = difference(a, b, paired, bounds, math.exp(log_alpha))
        return e.low if e.value > 0 else -e.high

    least, most = math.log(1e-12), math.log(0.999)
    found = difference(a, b, paired, bounds)
    if math.isnan(found.low):
        return math.nan
    if found.value == 0 or nearest_end(most) <= 0:
        return 1.0
    return 1e-12 if nearest_end(least) > 0 else math.exp(optimize.brentq(nearest_end, least, most, xtol=1e-6))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values so adjusted that "below .05" is wrong for any of them in 5 of 100 such lists (Holm 1979).

    nan stands for a test that couldn't be made, and isn't counted.
    """
    adjusted = np.array(p_values, float)
    order = [i for i in np.argsort(adjusted) if not math.isnan(adjusted[i])]
    reached = 0.0
    for rank, i in enumerate(order):
        reached = max(reached, min(1.0, (len(order) - rank) * adjusted[i]))
        adjusted[i] = reached
    return adjusted.tolist()


def _mean(groups: Groups) -> float:
    return math.fsum(g.mean() for g in groups) / len(groups)


def _freedom(parts: np.ndarray, groups: Groups) -> float:
    """Satterthwaite's degrees of freedom of a sum of variances, one for each stratum."""
    return float(parts.sum() ** 2 / (parts**2 / [len(g) - 1 for g in groups]).sum())


def _students(groups: Groups, alpha: float) -> Ends:
    if min(map(len, groups)) < 2:
        return math.nan, math.nan
    value, parts = _mean(groups), np.array([g.var(ddof=1) / len(g) for g in groups]) / len(groups) ** 2
    reach = 0.0 if parts.sum() == 0 else -special.stdtrit(_freedom(parts, groups), alpha / 2) * math.sqrt(parts.sum())
    return value - reach, value + reach


def _of_share(groups: Groups, alpha: float) -> Ends:
    """Ends for the mean of numbers in [0, 1]."""
    sizes = [len(g) for g in groups]
    if min(sizes) < 2:
        return math.nan, math.nan
    value = _mean(groups)
    if value in (0, 1):
        reach = 1 - _least_mean(np.array(sizes), alpha / 2)
        return (0.0, reach) if value == 0 else (1 - reach, 1.0)
    spread = value * (1 - value)
    parts = np.array([(((g - g.mean()) ** 2).sum() + spread) / len(g) ** 2 for g in groups]) / len(groups) ** 2
    certainty = special.ndtri(alpha / 2) / special.stdtrit(_freedom(parts, groups), alpha / 2)
    n = spread / parts.sum() * certainty**2
    low = special.betaincinv(n * value, n * (1 - value) + 1, alpha / 2)
    high = special.betaincinv(n * value + 1, n * (1 - value), 1 - alpha / 2)
    return float(low), float(high)


def _least_mean(sizes: np.ndarray, chance: float) -> float:
    """Least mean of the strata's probabilities p with which all prompts are right with at least that `chance`.

    The minimum of sum p under sum sizes log p >= log chance has every p proportional to its size, or 1.
    """

    def slack(log_factor: float) -> float:
        return float((sizes * np.minimum(log_factor + np.log(sizes), 0)).sum() - math.log(chance))

    most = -math.log(sizes.min())
    factor = optimize.brentq(slack, most + math.log(chance) - 1, most)
    return float(np.minimum(math.exp(factor) * sizes, 1).mean())


def _of_difference(groups: Groups, values: Sequence[float], reach: float, alpha: float) -> Ends:
    """Ends for the mean of differences in [-reach, reach], given by prompt and by picture."""
    if not set(map(abs, values)) <= {0.0, reach}:
        low, high = _students(groups, alpha)
        return max(low, -reach), min(high, reach)
    better, worse = ([np.maximum(sign * g, 0) / reach for g in groups] for sign in (1, -1))
    variances = [sum(g.var() / len(g) for g in side) for side in (better, worse)]
    covariance = -sum(x.mean() * y.mean() / len(x) for x, y in zip(better, worse, strict=True))
    correlation = covariance / math.sqrt(math.prod(variances)) if min(variances) > 0 else 0.0
    low, high = _mover(worse, better, correlation, alpha)
    return max(reach * low, -reach), min(reach * high, reach)


def _of_two(before: Groups, after: Groups, bounds: Bounds | None, alpha: float) -> Ends:
    """Ends for the difference of two independent scores."""
    if bounds is not None:
        scale = bounds[1] - bounds[0]
        low, high = _mover(*([(g - bounds[0]) / scale for g in side] for side in (before, after)), 0.0, alpha)
        return scale * max(low, -1), scale * min(high, 1)
    if min(map(len, before + after)) < 2:
        return math.nan, math.nan
    parts = np.concatenate([[g.var(ddof=1) / len(g) / len(side) ** 2 for g in side] for side in (before, after)])
    value = _mean(after) - _mean(before)
    freedom = _freedom(parts, before + after) if parts.sum() > 0 else 1.0
    reach = -special.stdtrit(freedom, alpha / 2) * math.sqrt(parts.sum())
    return value - reach, value + reach


def _mover(minus: Groups, plus: Groups, correlation: float, alpha: float) -> Ends:
    """Ends for the difference of two shares, from the ends of each (Zou & Donner 2008)."""
    (p, q), ((p_low, p_high), (q_low, q_high)) = map(_mean, (plus, minus)), (_of_share(s, alpha) for s in (plus, minus))

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(x**2 + y**2 - 2 * correlation * x * y, 0.0))

    return p - q - reach(p - p_low, q_high - q), p - q + reach(p_high - p, q - q_low)
