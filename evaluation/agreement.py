"""How well a judge agrees with people: share of equal verdicts and Cohen's kappa, with intervals over prompts."""

from dataclasses import dataclass

import numpy as np

REPEATS = 5000


@dataclass(frozen=True)
class Agreement:
    """Share of equal verdicts and kappa (agreement beyond chance), each (value, low, high) at 95 %."""

    n: int
    share: tuple[float, float, float]
    kappa: tuple[float, float, float]


def cohen_kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's kappa of two lists of booleans (Cohen 1960); nan if both are constant and equal."""
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return float("nan") if chance == 1 else float(((a == b).mean() - chance) / (1 - chance))


def agreement(labels: list[bool], verdicts: list[bool], prompts: list[str], seed: int = 0) -> Agreement:
    """Agreement of verdicts with labels; pictures of one prompt are resampled together.

    Raises ValueError for lists of different lengths, or without any entry.
    """
    if not labels or not len(labels) == len(verdicts) == len(prompts):
        raise ValueError(f"need as many labels as verdicts and prompts: {len(labels)}, {len(verdicts)}, {len(prompts)}")
    a, b = np.array(labels, bool), np.array(verdicts, bool)
    names, cluster = np.unique(prompts, return_inverse=True)
    members = [np.flatnonzero(cluster == i) for i in range(len(names))]
    rng = np.random.default_rng(seed)
    shares, kappas = [], []
    for _ in range(REPEATS):
        chosen = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        shares.append((a[chosen] == b[chosen]).mean())
        kappas.append(cohen_kappa(a[chosen], b[chosen]))
    low_high = lambda values: tuple(np.nanquantile(values, (0.025, 0.975)).tolist())  # noqa: E731
    return Agreement(len(a), (float((a == b).mean()), *low_high(shares)), (cohen_kappa(a, b), *low_high(kappas)))
