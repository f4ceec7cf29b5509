"""The page of a post-training run: what it gained, curves, the same prompts as it went on."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.curves import plot, png_address, read_rows
from training.run_folder import GAINS, MEASURES

if TYPE_CHECKING:
    from evaluation.intervals import Scores

CURVES = {
    "held-out loss": ("held_out", "loss"),
    "reward of training prompts": ("metrics", "reward"),
    "pairs told apart": ("metrics", "accuracy"),
    "held-out pairs told apart": ("held_out", "accuracy"),
    "judge, strictly, validation": ("validation", "strict"),
    "KL": ("metrics", "kl"),
    "ratio's move / clip range": ("metrics", "ratio_deviation"),
}
"""What is drawn: the file of the run and the name in it."""
VERDICTS = ["strict", "official", "reward"]
SHOWN = 8
"""Rows of samples at most."""


class Paged:
    """A trainer whose runs get a page."""

    @property
    def captions(self) -> list[str]:
        """Texts of the pictures of samples/, where they are known."""
        return []

    def finished(self, run: Path) -> None:
        """Write the page, once the run is at its end."""
        if hasattr(super(), "finished"):
            super().finished(run)
        captions = self.captions and [*self.captions, *self.config.own_prompts()]
        print(f"open {write_page(run, captions)}", flush=True)


def gains(folder: Path) -> dict[str, dict[str, Any]]:
    """Last measurement minus first: value with its 95 % interval, n, first and last value. Empty if there are not two.

    "loss" and "accuracy" on held-out samples or pairs are paired by these; "strict", "official" and "reward" of
    validation by prompt and seed. Of those that were measured both times.
    """
    from evaluation.intervals import difference, estimate

    found = {}
    for measured, names in (("held_out", ["loss", "accuracy"]), ("validation", VERDICTS)):
        first, last = _ends(folder / measured)
        for name in (n for n in names if n in first and n in last):
            before, after = (_scores(each, name) for each in (first, last))
            shares = measured == "validation" and all(0 <= v <= 1 for v in (*before.values, *after.values))
            gain = difference(before, after, True, (0.0, 1.0) if shares else None)
            ends = {"first": estimate(before).value, "last": estimate(after).value}
            found[name] = {"value": gain.value, "low": gain.low, "high": gain.high, "n": gain.n, **ends}
    return found


def _scores(each: dict[str, list], name: str) -> "Scores":
    from evaluation.intervals import Scores

    return Scores(each[name], each.get("prompt") or each["key"], each.get("stratum"))


def _ends(folder: Path) -> tuple[dict[str, list], dict[str, list]]:
    """What each picture or sample got first and last, of those that were measured both times: all of them, unless the
    validation was changed on the way or a sample could not be read. Empty if there are not two."""
    files = sorted(folder.glob("step_*.json"))
    if len(files) < 2:
        return {}, {}
    ends = [json.loads(f.read_text()) for f in (files[0], files[-1])]
    if not all(each.get("prompt") or each.get("key") for each in ends):  # a validation that names no prompts
        return {}, {}
    places = [{item: place for place, item in enumerate(_items(each))} for each in ends]
    both = [item for item in places[0] if item in places[1]]
    if len(both) < 2:
        return {}, {}
    first, last = (
        {name: [values[place[item]] for item in both] for name, values in each.items()}
        for each, place in zip(ends, places, strict=True)
    )
    return first, last


def _items(each: dict[str, list]) -> Iterator[tuple[str, int]]:
    """The prompt or key of each, and how many there were of it so far."""
    seen = Counter()
    for name in each.get("prompt") or each["key"]:
        seen[name] += 1
        yield name, seen[name]


def write_page(folder: Path, prompts: Sequence[str]) -> Path:
    """Write index.html and gains.json into a run's folder, whose samples are of these prompts; returns the former."""
    import jinja2

    from files import atomic_file, write_json

    found = gains(folder)
    write_json(folder / GAINS, found)
    samples = {int(f.stem.removeprefix("step_")): png_address(f.read_bytes()) for f in _spread(folder / "samples")}
    curves = _curves(folder)
    template = jinja2.Template((Path(__file__).parent / "page.html").read_text(), autoescape=True)
    values = {"name": folder.name, "gains": found, "curves": png_address(plot(curves)) if curves else None}
    values |= {"samples": samples, "prompts": prompts}
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
    rows = {name: read_rows(folder / f"{name}.jsonl") for name in ("metrics", *MEASURES)}
    found = {
        label: [(r["step"], r[name]) for r in rows[file] if r.get(name) is not None]
        for label, (file, name) in CURVES.items()
    }
    return {label: points for label, points in found.items() if points}
