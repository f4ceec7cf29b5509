import functools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from evaluation.intervals import Scores, difference, estimate, holm, p_value

REPEATS = 1000
SIX_TAGS = [9, 18, 13, 40, 40, 40]


def pictures(rng, sizes, means, images=4, abilities=None):
    """Binary scores of pictures whose prompts differ: a prompt's chance of success is Beta with the stratum's mean."""
    if abilities is None:
        beta = lambda m, n: np.full(n, m) if m in (0, 1) else rng.beta(1.5 * m, 1.5 * (1 - m), n)  # noqa: E731
        abilities = [beta(m, n) for n, m in zip(sizes, means, strict=True)]
    values = [rng.random((n, images)) < p[:, None] for n, p in zip(sizes, abilities, strict=True)]
    return Scores(np.concatenate([v.ravel() for v in values]).tolist(), *names(tuple(sizes), images)), abilities


@functools.cache
def names(sizes, images):
    prompts = [f"{s}/{i}" for s, n in enumerate(sizes) for i in range(n) for _ in range(images)]
    return prompts, [p.split("/")[0] for p in prompts]


DESIGNS = {
    "one tag": ([60], [0.6]),
    "six tags": (SIX_TAGS, [0.9, 0.8, 0.3, 0.7, 0.5, 0.4]),
    "one tag, .98": ([60], [0.98]),
    "six tags, .98": (SIX_TAGS, [0.98] * 6),
    "six tags, .02": (SIX_TAGS, [0.02] * 6),
    "the smallest tag .9, others 1": (SIX_TAGS, [0.9, 1, 1, 1, 1, 1]),
    "the largest tag .9, others 1": (SIX_TAGS, [1, 1, 1, 1, 1, 0.9]),
    "the smallest tag .2, others 0": (SIX_TAGS, [0.2, 0, 0, 0, 0, 0]),
    "48 prompts of six tags": ([8] * 6, [0.3, 0.2, 0.1, 0.2, 0.05, 0.1]),
}


@pytest.mark.parametrize("design, images", [*((d, 4) for d in DESIGNS), *((d, 1) for d in list(DESIGNS)[3:6])])
def test_the_interval_covers_the_truth_95_times_in_100(design, images):
    (sizes, means), covered, width = DESIGNS[design], 0, 0.0
    truth = np.mean(means)
    for r in range(REPEATS):
        scores, _ = pictures(np.random.default_rng([1, r]), sizes, means, images)
        e = estimate(scores, (0, 1))
        assert 0 <= e.low <= e.value <= e.high <= 1
        covered += e.low <= truth + 1e-12 and truth - 1e-12 <= e.high
        width += e.high - e.low
    print(f"{design}, {images} pictures: {covered / REPEATS:.3f}, width {width / REPEATS:.3f}")
    assert covered / REPEATS >= 0.94


DIFFERENCES = {
    "two tags": ([20, 40], [0.5, 0.6]),
    "six tags, .98": (SIX_TAGS, [0.98] * 6),
    "six tags, .02": (SIX_TAGS, [0.02] * 6),
    "one tag .9, others 1": (SIX_TAGS, [0.9, 1, 1, 1, 1, 1]),
}


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("design", DIFFERENCES)
def test_differences_cover_their_truth_and_zero_is_rarely_significant(design, paired):
    (sizes, means), covered, false_alarms = DIFFERENCES[design], 0, 0
    truth = np.mean([0.1 * (1 - m) for m in means])
    for r in range(REPEATS):
        rng = np.random.default_rng([2, r])
        a, abilities = pictures(rng, sizes, means)
        b, again = pictures(rng, sizes, means, abilities=abilities if paired else None)
        false_alarms += difference(a, b, paired, (0, 1)).significant
        c, _ = pictures(rng, sizes, means, abilities=[p + 0.1 * (1 - p) for p in again])
        e = difference(a, c, paired, (0, 1))
        assert -1 <= e.low <= e.value <= e.high <= 1
        covered += e.low <= truth + 1e-12 and truth - 1e-12 <= e.high
    print(f"{design}, paired {paired}: {covered / REPEATS:.3f}, false alarms {false_alarms / REPEATS:.3f}")
    assert false_alarms / REPEATS <= 0.06 and covered / REPEATS >= 0.94


def test_without_bounds_students_interval_covers_means_and_differences():
    covered = np.zeros(2)
    for r in range(REPEATS):
        rng = np.random.default_rng([4, r])
        sides = [[rng.normal(mean, 1 + mean, n) for mean, n in ((0, 12), (1, 20))] for _ in range(2)]
        scores = [Scores(np.concatenate(s), [f"{i}" for i in range(32)], ["a"] * 12 + ["b"] * 20) for s in sides]
        e, d = estimate(scores[0]), difference(*scores, paired=False)
        covered += [e.low <= 0.5 <= e.high, d.low <= 0 <= d.high]
    assert (covered / REPEATS >= 0.94).all() and (covered / REPEATS <= 0.965).all()


@pytest.mark.parametrize("bounds", [(0, 1), None])
def test_pictures_of_one_prompt_count_as_one(bounds):
    rng = np.random.default_rng(0)
    once, _ = pictures(rng, [50], [0.5], images=1)
    copies = Scores(
        np.repeat(once.values, 20), np.repeat(once.prompts, 20).tolist(), np.repeat(once.strata, 20).tolist()
    )
    a, b = estimate(once, bounds), estimate(copies, bounds)
    assert (a.low, a.high) == (b.low, b.high) and (a.n, b.n, a.prompts, b.prompts) == (50, 1000, 50, 50)


def test_equal_to_the_t_interval_where_that_is_exact():
    values = np.random.default_rng(3).normal(2, 1, 30)
    e = estimate(Scores(values, [str(i) for i in range(30)]))
    low, high = stats.t.interval(0.95, 29, values.mean(), stats.sem(values))
    assert e.value == pytest.approx(values.mean())
    assert (e.low, e.high) == pytest.approx((low, high))


def test_strata_weigh_the_same_whatever_their_size():
    scores = Scores([1] * 10 + [0] * 90, [str(i) for i in range(100)], ["a"] * 10 + ["b"] * 90)
    assert estimate(scores).value == 0.5


def test_a_score_at_its_bound_gets_the_exact_binomial_interval():
    e = estimate(Scores([1.0] * 40, [str(i // 4) for i in range(40)]), (0, 1))
    exact = stats.binomtest(10, 10).proportion_ci(0.95, "exact")
    assert (e.low, e.high) == pytest.approx((exact.low, exact.high))
    assert estimate(Scores([0.0] * 8, [str(i) for i in range(8)]), (0, 1)).low == 0
    # Of strata: the least mean of chances with which all prompts are right in one of 40 samples.
    sizes = np.array([3, 5, 20])
    found = optimize.minimize(
        lambda p: p.mean(),
        [0.9] * 3,
        bounds=[(0.01, 1)] * 3,
        constraints={"type": "ineq", "fun": lambda p: (sizes * np.log(p)).sum() - np.log(0.025)},
    )
    names = [f"{s}/{i}" for s, n in enumerate(sizes) for i in range(n)]
    e = estimate(Scores([1.0] * 28, names, [n[0] for n in names]), (0, 1))
    assert (e.low, e.high) == pytest.approx((found.fun, 1), abs=1e-4)


def test_two_models_without_a_difference_are_not_known_to_be_equal():
    same = Scores([1.0, 0.0] * 20, [str(i) for i in range(40)])
    e = difference(same, same, paired=True, bounds=(0, 1))
    assert e.value == 0 and e.high == pytest.approx(stats.binomtest(0, 40).proportion_ci(0.95, "exact").high)
    assert e.low == -e.high and p_value(same, same, True, (0, 1)) == 1


def test_p_values_are_those_at_which_the_interval_touches_zero():
    rng = np.random.default_rng(7)
    a, abilities = pictures(rng, [30, 20], [0.4, 0.5])
    b, _ = pictures(rng, [30, 20], [0.4, 0.5], abilities=[p + 0.5 * (1 - p) for p in abilities])
    for bounds in ((0, 1), None):
        for paired in (True, False):
            p = p_value(a, b, paired, bounds)
            e = difference(a, b, paired, bounds, alpha=p)
            assert 0 < p < 0.05 and e.low == pytest.approx(0, abs=1e-4) and e.high > 0.1
            assert p_value(b, a, paired, bounds) == pytest.approx(p, rel=1e-3)
    values = rng.normal(0.3, 1, (2, 25))
    sides = [Scores(v, [str(i) for i in range(25)]) for v in values]
    assert p_value(*sides, paired=True) == pytest.approx(stats.ttest_rel(*values).pvalue, rel=1e-3)
    alone = Scores([1.0, 0.0], ["a", "a"])
    assert math.isnan(p_value(alone, alone, True, (0, 1)))


def test_many_measures_need_smaller_p_values():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1] and holm([0.01]) == [0.01] and holm([]) == []
    adjusted = holm([0.02, math.nan, 0.03])
    assert adjusted[0] == adjusted[2] == 0.04 and math.isnan(adjusted[1])
    wrong = [min(holm(np.random.default_rng([8, r]).random(8))) < 0.05 for r in range(2000)]
    assert np.mean(wrong) <= 0.06


def test_results_depend_on_nothing_but_the_scores():
    a, _ = pictures(np.random.default_rng(5), [30, 20], [0.5, 0.7])
    order = np.random.default_rng(6).permutation(len(a.values))
    shuffled = Scores(*([list(x)[i] for i in order] for x in (a.values, a.prompts, a.strata)))
    assert estimate(a, (0, 1)) == estimate(shuffled, (0, 1))
    assert math.isnan(estimate(Scores([1, 0], ["a", "a"])).low)
    assert math.isnan(estimate(Scores([1, 0], ["a", "a"]), (0, 1)).low)


def test_mismatched_scores_are_refused():
    with pytest.raises(ValueError, match="equally many"):
        Scores([1, 0], ["a"])
    with pytest.raises(ValueError, match="same prompts"):
        difference(Scores([1, 0], ["a", "b"]), Scores([1, 0], ["a", "c"]), paired=True)
