"""The page of a run that learns from its own pictures: reward and judge, KL, the same prompts as it went on.

A run writes it at its end.
"""

import json
from pathlib import Path
from typing import Any

from command_line import UserError

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
    """Write index.html and gains.json into a run's folder; returns the former's path. UserError if it is no run."""
    import jinja2

    from files import atomic_file, write_json

    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} is no run (no metrics.jsonl)")
    found = gains(folder)
    write_json(folder / "gains.json", found)
    rows = [{"step": int(f.stem.removeprefix("step_")), "uri": _uri(f)} for f in _spread(folder / "samples")]
    template = jinja2.Template((Path(__file__).parent / "page.html").read_text(), autoescape=True)
    values = {"name": folder.name, "gains": found, "curves": _curves(folder), "rows": rows}
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


def _curves(folder: Path) -> str:
    """Small plots side by side, as a data: address."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = {name: _read(folder / f"{name}.jsonl") for name in ("metrics", "validation")}
    found = {
        label: [(r["step"], r[name]) for r in rows[file] if r.get(name) is not None]
        for label, (file, name) in CURVES.items()
    }
    found = {label: points for label, points in found.items() if points}
    figure, axes = plt.subplots(1, max(1, len(found)), figsize=(3 * max(1, len(found)), 2.4), squeeze=False)
    for axis, (label, points) in zip(axes[0], found.items(), strict=False):
        axis.plot(*zip(*points, strict=True), lw=1, marker="o" if len(points) < 20 else None, ms=3)
        axis.set_title(label, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    plt.close(figure)
    return _address(buffer.getvalue())


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in file.read_text().splitlines()] if file.exists() else []


def _uri(file: Path) -> str:
    return _address(file.read_bytes())


def _address(png: bytes) -> str:
    import base64

    return "data:image/png;base64," + base64.b64encode(png).decode()
