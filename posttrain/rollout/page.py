"""The page of a run that learns from its own pictures: reward and judge, KL, the same prompts as it went on.

A run writes it at its end.
"""

import json
from pathlib import Path
from typing import Any

from command_line import UserError
from training.curves import plot, png_address, read_rows

CURVES = {
    "reward of training prompts": ("metrics", "reward"),
    "judge, strictly, validation": ("validation", "strict"),
    "KL": ("metrics", "kl"),
    "ratio's move / clip range": ("metrics", "ratio_deviation"),
}
"""What is drawn: the file of the run and the name in it."""
SHOWN = 8
"""Rows of samples at most."""


def gains(folder: Path) -> dict[str, dict[str, Any]]:
    """Last validation minus first of each rule, paired by prompt and seed: value with its 95 % interval, n, first and
    last value. Empty if there are not two."""
    from evaluation.intervals import Scores, difference, estimate

    files = sorted((folder / "validation").glob("step_*.json"))
    if len(files) < 2:
        return {}
    first, last = (json.loads(f.read_text()) for f in (files[0], files[-1]))
    if first["prompt"] != last["prompt"]:
        raise UserError(f"{files[0]} and {files[-1]} are of different prompts")
    found = {}
    for rule in (name for name in ("strict", "official", "reward") if name in first):
        before, after = (Scores(each[rule], each["prompt"], each["stratum"]) for each in (first, last))
        gain = difference(before, after, True, (0.0, 1.0))
        ends = {"first": estimate(before).value, "last": estimate(after).value}
        found[rule] = {"value": gain.value, "low": gain.low, "high": gain.high, "n": gain.n, **ends}
    return found


def write_page(folder: Path) -> Path:
    """Write index.html and gains.json into a run's folder; returns the former's path."""
    import jinja2

    from files import atomic_file, write_json

    found = gains(folder)
    write_json(folder / "gains.json", found)
    samples = {int(f.stem.removeprefix("step_")): png_address(f.read_bytes()) for f in _spread(folder / "samples")}
    curves = _curves(folder)
    template = jinja2.Template((Path(__file__).parent / "page.html").read_text(), autoescape=True)
    values = {"name": folder.name, "gains": found, "curves": png_address(plot(curves)) if curves else None}
    values["samples"] = samples
    values["config"] = (folder / "config.toml").read_text()
    with atomic_file(folder / "index.html") as file:
        file.write(template.render(values).encode())
    return folder / "index.html"


def _spread(samples: Path) -> list[Path]:
    """At most SHOWN of the pictures, the first and the last among them."""
    files = sorted(samples.glob("step_*.png"))
    if len(files) <= SHOWN:
        return files
    return [files[round(i * (len(files) - 1) / (SHOWN - 1))] for i in range(SHOWN)]


def _curves(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Points (step, value) of CURVES, of those that have any."""
    rows = {name: read_rows(folder / f"{name}.jsonl") for name in ("metrics", "validation")}
    found = {
        label: [(r["step"], r[name]) for r in rows[file] if r.get(name) is not None]
        for label, (file, name) in CURVES.items()
    }
    return {label: points for label, points in found.items() if points}
