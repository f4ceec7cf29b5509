"""Stage 5 on planted codes and frames; stages 6 and 7 on data sets made up for them."""

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


def test_domains_get_their_shares_and_as_many_as_there_are():
    counts = {"nature": 900, "design": 100, "people": 300, "synthetic": 50, "unknown": 70}
    domains = [name for name, n in counts.items() for _ in range(n)]
    keys = [f"k{i}" for i in range(len(domains))]
    kept = Counter(d for d, x in zip(domains, domain_excess(keys, domains), strict=True) if x is None or x <= 1)
    assert kept["unknown"] == 70 and kept["design"] == 100  # design is the scarcest: its quota is all of it
    total = sum(kept.values()) - 70
    for name, share in DOMAIN_SHARES.items():
        assert kept[name] / total == pytest.approx(share, abs=0.005)
    assert domain_excess([], []) == []
    two = domain_excess(keys[:200], ["nature"] * 120 + ["people"] * 80)
    assert sum(x <= 1 for x in two[:120]) == 120 and sum(x <= 1 for x in two[120:]) == int(120 / 0.55 * 0.13)


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
