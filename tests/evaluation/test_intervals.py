import math

import numpy as np
import pytest
from scipy import stats

from evaluation import intervals
from evaluation.intervals import Scores, difference, estimate

REPEATS = 2000


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(intervals, "REPEATS", 1000)


def pictures(rng, sizes, means, images=4, abilities=None):
    """Binary scores of pictures whose prompts differ: a prompt's chance of success is Beta with the stratum's mean."""
    if abilities is None:
        abilities = [rng.beta(1.5 * m, 1.5 * (1 - m), n) for n, m in zip(sizes, means, strict=True)]
    values = [rng.random((n, images)) < p[:, None] for n, p in zip(sizes, abilities, strict=True)]
    prompts = [f"{s}/{i}" for s, n in enumerate(sizes) for i in range(n) for _ in range(images)]
    strata = [p.split("/")[0] for p in prompts]
    return Scores(np.concatenate([v.ravel() for v in values]), prompts, strata), abilities


DESIGNS = [([60], [0.6]), ([9, 18, 13, 40, 40, 40], [0.9, 0.8, 0.3, 0.7, 0.5, 0.4])]


@pytest.mark.parametrize("sizes, means", DESIGNS)
def test_the_interval_covers_the_truth_95_times_in_100(quick, sizes, means):
    truth, covered = np.mean(means), 0
    for r in range(REPEATS):
        scores, _ = pictures(np.random.default_rng([1, r]), sizes, means)
        e = estimate(scores, (0, 1), seed=r)
        covered += e.low <= truth <= e.high
    assert abs(covered / REPEATS - 0.95) <= 0.015


@pytest.mark.parametrize("paired", [True, False])
def test_differences_cover_their_truth_and_zero_is_rarely_significant(quick, paired):
    sizes, covered, false_alarms = [20, 40], 0, 0
    for r in range(REPEATS):
        rng = np.random.default_rng([2, r])
        a, abilities = pictures(rng, sizes, [0.5, 0.6])
        same = abilities if paired else None
        b, _ = pictures(rng, sizes, [0.5, 0.6], abilities=same)
        false_alarms += difference(a, b, paired, seed=r).significant
        raised = [np.minimum(p + 0.1 * (1 - p), 1) for p in abilities] if paired else None
        c, _ = pictures(rng, sizes, [0.55, 0.64], abilities=raised)
        e = difference(a, c, paired, seed=r)
        covered += e.low <= 0.045 <= e.high
    assert false_alarms / REPEATS <= 0.06
    assert abs(covered / REPEATS - 0.95) <= 0.015


def test_pictures_of_one_prompt_count_as_one(quick):
    rng = np.random.default_rng(0)
    once, _ = pictures(rng, [50], [0.5], images=1)
    copies = Scores(
        np.repeat(once.values, 20), np.repeat(once.prompts, 20).tolist(), np.repeat(once.strata, 20).tolist()
    )
    a, b = estimate(once), estimate(copies)
    assert (a.low, a.high) == (b.low, b.high) and (a.n, b.n, a.prompts, b.prompts) == (50, 1000, 50, 50)


def test_equal_to_the_t_interval_where_that_is_exact():
    values = np.random.default_rng(3).normal(2, 1, 30)
    e = estimate(Scores(values, [str(i) for i in range(30)]))
    low, high = stats.t.interval(0.95, 29, values.mean(), stats.sem(values))
    assert e.value == pytest.approx(values.mean())
    assert (e.low, e.high) == pytest.approx((low, high), abs=0.03)


def test_strata_weigh_the_same_whatever_their_size():
    scores = Scores([1] * 10 + [0] * 90, [str(i) for i in range(100)], ["a"] * 10 + ["b"] * 90)
    assert estimate(scores).value == 0.5


def test_a_score_at_its_bound_gets_the_exact_binomial_interval():
    e = estimate(Scores([1.0] * 40, [str(i // 4) for i in range(40)]), (0, 1))
    exact = stats.binomtest(10, 10).proportion_ci(0.95, "exact")
    assert (e.low, e.high) == pytest.approx((exact.low, exact.high))
    assert estimate(Scores([0.0] * 8, [str(i) for i in range(8)]), (0, 1)).low == 0


def test_results_depend_on_nothing_but_the_scores(quick):
    a, _ = pictures(np.random.default_rng(5), [30, 20], [0.5, 0.7])
    order = np.random.default_rng(6).permutation(len(a.values))
    shuffled = Scores(*([list(x)[i] for i in order] for x in (a.values, a.prompts, a.strata)))
    assert estimate(a) == estimate(shuffled)
    assert math.isnan(estimate(Scores([1, 0], ["a", "a"])).low)


def test_mismatched_scores_are_refused():
    with pytest.raises(ValueError, match="equally many"):
        Scores([1, 0], ["a"])
    with pytest.raises(ValueError, match="same prompts"):
        difference(Scores([1, 0], ["a", "b"]), Scores([1, 0], ["a", "c"]), paired=True)
