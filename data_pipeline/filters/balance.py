"""Stages 6 and 7, on the data set as a whole: shares of domains, the best of each category, rare characters."""

import hashlib
from collections import Counter, defaultdict

DOMAIN_SHARES = {"nature": 0.55, "design": 0.27, "people": 0.13, "synthetic": 0.05}
"""Of the Qwen-Image report, section 3.1."""
FULL_AT = 1 / 4
"""Of its share: a domain that has so much of it lays claim to all of it, one that has less to that in proportion."""


def domain_excess(keys: list[str], domains: list[str]) -> list[float | None]:
    """Each sample's place in its domain over the domain's quota: above 1 there are too many of its kind.

    A quota is the domain's share (`DOMAIN_SHARES`) of all samples that there are, unknown ones too, not of what the
    scarcest domain could fill: a shortage of one is not mended by throwing others away. Shares that scarce or absent
    domains don't lay claim to are dealt to all, so that one sample of a domain costs the others a handful at most, and
    a set of one domain stays whole. Places are by a hash of the key. None for other domains and for unknown.
    """
    counts = Counter(d for d in domains if d in DOMAIN_SHARES)
    claimed = sum(min(DOMAIN_SHARES[d], n / (FULL_AT * len(domains))) for d, n in counts.items())
    places = _places(keys, domains, [0.0] * len(keys))
    return [
        place / max(1.0, round(len(domains) * DOMAIN_SHARES[d] / claimed, 6)) if d in DOMAIN_SHARES else None
        for place, d in zip(places, domains, strict=True)
    ]


def category_rank(keys: list[str], categories: list[str], quality: list[float]) -> list[float | None]:
    """Each sample's rank in its category by `quality`, 1 the best; None for category "unknown"."""
    places = _places(keys, categories, quality)
    return [None if c == "unknown" else float(place) for place, c in zip(places, categories, strict=True)]


def repeats(texts: list[str], at_least: int, most: int = 8) -> list[int]:
    """How often to write each sample so that every character of the texts comes at least `at_least` times.

    A sample is written for its rarest character, `most` times at the utmost; characters that all are frequent give 1.
    """
    counts = Counter(c for text in texts for c in set(text) if c.isalpha())
    rarest = (min((counts[c] for c in set(text) if c.isalpha()), default=at_least) for text in texts)
    return [min(most, max(1, -(-at_least // n))) for n in rarest]


def _places(keys: list[str], groups: list[str], quality: list[float]) -> list[int]:
    """1, 2, ... within each group, by falling quality, then by a hash of the key."""
    members: dict[str, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    places = [0] * len(keys)
    for indices in members.values():
        indices.sort(key=lambda i: (-quality[i], hashlib.blake2b(keys[i].encode(), digest_size=8).digest()))
        for place, i in enumerate(indices, 1):
            places[i] = place
    return places
