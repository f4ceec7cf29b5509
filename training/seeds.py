"""Runs that differ by their seed, side by side."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from files import write_json
from training.curves import read_rows
from training.run_folder import GAINS, MEASURES


def train_seeds(config: Any, train_once: Callable[[Any], bool]) -> None:
    """Train once with each seed of a `RunConfig` and compare the last scores.

    KeyboardInterrupt if a signal came in a run's last step.
    """
    runs = []
    for seed in range(config.loop.seed, config.loop.seed + config.seeds):
        runs.append(config.out / f"seed-{seed}")
        if train_once(replace(config, seeds=1, out=runs[-1], loop=replace(config.loop, seed=seed))):
            raise KeyboardInterrupt
    if os.environ.get("RANK", "0") == "0":
        compare(config.out, runs)


def compare(out: Path, runs: list[Path]) -> None:
    """Write OUT/seeds.json, {name: {mean, low, high, values}} of the runs' last metrics and what hooks measured last,
    and of what they gained if they measured first, too; print it.

    low and high are the ends of Student's 95 % interval of the mean over seeds.
    """
    rows = [last_scores(run) for run in runs]
    table = {name: summary([row[name] for row in rows]) for name in rows[0] if all(name in row for row in rows)}
    write_json(out / "seeds.json", table)
    width = max(map(len, table))
    for name, entry in table.items():
        values = "  ".join(f"{v:.4g}" for v in entry["values"])
        print(f"{name:<{width}}  {entry['mean']:.4g} [{entry['low']:.4g}, {entry['high']:.4g}]  ({values})")
    print(f"wrote {out}/seeds.json")


def last_scores(run: Path) -> dict[str, float]:
    """The finite numbers of a run's last step and last measurements, and its gains."""
    scores: dict[str, float] = {}
    for file, prefix in (("metrics", ""), *((name, f"{name}/") for name in MEASURES)):
        last = (read_rows(run / f"{file}.jsonl") or [{}])[-1]
        scores |= {prefix + name: value for name, value in last.items() if name != "step" and value is not None}
    if (run / GAINS).exists():
        gains = json.loads((run / GAINS).read_text())
        scores |= {f"gain/{name}": gain["value"] for name, gain in gains.items()}
    return scores


def summary(values: list[float]) -> dict[str, object]:
    """Mean of at least two values, with Student's 95 % interval."""
    mean, error = float(np.mean(values)), float(stats.sem(values))
    half = error * float(stats.t.ppf(0.975, len(values) - 1))
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": values}
