"""Stage 5 on planted codes and frames; stages 6 and 7 on data sets made up for them."""

import itertools
from collections import Counter

import planted
import pytest
from test_filters import check, good_views, plant

from data_pipeline.filters.balance import DOMAIN_SHARES, category_rank, domain_excess, repeats

LARGE = ("astronaut.png", "motorcycle_left.png", "camera.png", "gravel.png", "grace_hopper.jpg", "brick.png")


@pytest.mark.parametrize(
    ("name", "planter"),
    [("qr_code", planted.with_qr_code), ("barcode", planted.with_barcode), ("frame", planted.framed)],
)
def test_planted_marks(name: str, planter: planted.Planter):
    check(name, good_views(), plant((planter,), LARGE))


@pytest.mark.parametrize(
    ("counts", "kept"),
    [
        ((10_000, 0, 1, 0), (9_993, 0, 1, 0)),
        ((9_000, 900, 80, 21), (6_393, 900, 80, 21)),
        ((8_000, 1_000, 800, 200), (5_500, 1_000, 800, 200)),
        ((550, 270, 130, 50), (550, 270, 130, 50)),
        ((0, 10, 0, 0), (0, 10, 0, 0)),
        ((500, 500, 0, 0), (500, 329, 0, 0)),
        ((1, 0, 0, 10_000), (1, 0, 0, 9_921)),
        ((900, 100, 300, 50, 70), (781, 100, 184, 50, 70)),
        ((900, 0, 100, 0, 9_000), (900, 0, 100, 0, 9_000)),
    ],
)
def test_a_domain_gets_its_share_of_what_there_is(counts: tuple[int, ...], kept: tuple[int, ...]):
    names = [*DOMAIN_SHARES, "unknown"][: len(counts)]
    domains = [name for name, n in zip(names, counts, strict=True) for _ in range(n)]
    keys = [f"k{i}" for i in range(len(domains))]
    found = Counter(d for d, x in zip(domains, domain_excess(keys, domains), strict=True) if x is None or x <= 1)
    assert tuple(found[name] for name in names) == kept


def test_one_sample_of_a_domain_costs_the_others_little():
    for many, few in itertools.permutations(DOMAIN_SHARES, 2):
        for n in (1, 3):
            excess = domain_excess([f"k{i}" for i in range(4_000 + n)], [many] * 4_000 + [few] * n)
            assert sum(x > 1 for x in excess) <= 4 * n / DOMAIN_SHARES[many]
    assert domain_excess([], []) == []


def test_what_is_drawn_does_not_depend_on_the_order_of_samples():
    domains = ["nature", "people"] * 50
    keys = [f"k{i}" for i in range(100)]
    there = dict(zip(keys, domain_excess(keys, domains), strict=True))
    back = dict(zip(keys[::-1], domain_excess(keys[::-1], domains[::-1]), strict=True))
    assert there == back


def test_the_best_of_each_category_come_first():
    ranks = category_rank(list("abcdef"), ["x", "x", "y", "x", "unknown", "y"], [0.1, 0.9, 0.5, 0.3, 9, 0.7])
    assert ranks == [3, 1, 2, 2, None, 1]


def test_rare_characters_come_often_enough():
    texts = ["the cat"] * 40 + ["龘 the cat"] + ["饕餮"] * 3 + ["..."]
    times = repeats(texts, at_least=6)
    assert times == [1] * 40 + [6] + [2] * 3 + [1]
    counts = Counter(c for text, n in zip(texts, times, strict=True) for c in list(set(text)) * n if c.isalpha())
    assert min(counts.values()) >= 6
    assert repeats(["a"], at_least=100, most=8) == [8] and repeats(["a"], at_least=0) == [1]
