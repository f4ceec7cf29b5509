"""From rows to scores.json and a page: values with intervals, ceilings and floors, comparisons, pictures."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.page import contact_sheet, picture_uri
from evaluation.intervals import ALPHA, Estimate, Scores, difference, estimate, holm, p_value
from evaluation.runner import CONTROLS, Row, Source, SuiteRun, read_picture
from files import atomic_file, write_json

PAGE_PICTURES, PAGE_SIDE, SHEET_COLUMNS = 64, 256, 16


@dataclass(frozen=True)
class Result:
    """A suite's finished run on one source."""

    run: SuiteRun
    rows: list[Row]
    distances: dict[str, Any] | None = None
    """FID and KID of the pictures, where they were asked for."""

    def scores(self, measure: str, kind: str = "model", stratum: str | None = None) -> Scores | None:
        """Numbers of one measure, of one kind of prompt or all; None if there are none."""
        chosen = [r for r in self.rows if r.kind == kind and stratum in (None, r.stratum) and measure in r.scores]
        if not chosen:
            return None
        return Scores([r.scores[measure] for r in chosen], [r.prompt for r in chosen], [r.stratum for r in chosen])

    def measures(self) -> list[str]:
        """Names of the measures, the primary one first, then as the suite lists them."""
        names = dict.fromkeys(name for r in self.rows for name in r.scores)
        return sorted(names, key=lambda name: name != self.run.suite.primary)

    def strata(self) -> list[str]:
        """Kinds of prompts, in the order in which they first come."""
        return list(dict.fromkeys(p.stratum for p in self.run.prompts))

    def bounds(self, measure: str) -> tuple[float, float] | None:
        """Least and greatest value, where the suite knows them."""
        return self.run.suite.bounds.get(measure)


def summary(result: Result) -> dict[str, Any]:
    """Every measure of a suite, over all prompts and by kind, as plain data."""
    run = result.run
    table: dict[str, Any] = {}
    for measure in result.measures():
        entry = _with_controls(result, measure, None)
        if entry is not None:
            entry["by kind"] = {s: e for s in result.strata() if (e := _with_controls(result, measure, s)) is not None}
            table[measure] = entry
    head = {"primary": run.suite.primary, "prompts": len(run.prompts), "judge": run.suite.fingerprint}
    return {**head, "scores": table, "distances": result.distances or {}}


def _with_controls(result: Result, measure: str, stratum: str | None) -> dict[str, Any] | None:
    scores = result.scores(measure, "model", stratum)
    if scores is None:
        return None
    bounds = result.bounds(measure)
    entry = plain(estimate(scores, bounds))
    for kind in CONTROLS:
        control = result.scores(measure, f"constant {measure}" if kind == "constant" else kind, stratum)
        entry[kind] = None if control is None else plain(estimate(control, bounds))
    return entry


def comparison(first: Result, second: Result) -> dict[str, Any]:
    """Second minus first for every measure, paired by prompt and seed, over all prompts and by kind.

    "significant" holds for all measures at once (p-values adjusted by Holm's method), and so for all entries by kind.
    """
    table: dict[str, Any] = {}
    for measure in first.measures():
        if (entry := _difference(first, second, measure, None)) is not None:
            kinds = {s: e for s in first.strata() if (e := _difference(first, second, measure, s)) is not None}
            table[measure] = {**entry, "by kind": kinds}
    for family in (list(table.values()), [e for entry in table.values() for e in entry["by kind"].values()]):
        for entry, p in zip(family, holm([e["p"] for e in family]), strict=True):
            entry["p"], entry["significant"] = None if math.isnan(p) else p, p < ALPHA
    return table


def _difference(first: Result, second: Result, measure: str, stratum: str | None) -> dict[str, Any] | None:
    a, b = first.scores(measure, "model", stratum), second.scores(measure, "model", stratum)
    if a is None or b is None:
        return None
    bounds = first.bounds(measure)
    return {**plain(difference(a, b, True, bounds)), "p": p_value(a, b, True, bounds)}


def plain(e: Estimate) -> dict[str, Any]:
    """An estimate as JSON: value, 95 % interval (null where it can't be told), pictures, prompts."""
    low, high = (None if math.isnan(end) else end for end in (e.low, e.high))
    return {"value": e.value, "low": low, "high": high, "n": e.n, "prompts": e.prompts}


def write_scores(folder: Path, source: Source, settings: dict[str, Any], results: list[Result], absent: dict) -> dict:
    """Write scores.json, index.html and a sheet of each suite's first pictures of one source; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    head = {"source": source.name, "fingerprint": source.fingerprint, "settings": settings}
    suites = {result.run.suite.name: summary(result) for result in results}
    data = {**head, "suites": suites, "not run": absent}
    write_json(folder / "scores.json", data)
    write_page(folder / "index.html", data, [(source.name, results)])
    for result in results:
        _write_sheet(folder / f"{result.run.suite.name.replace('/', '-')}.png", result.run)
    return data


def _write_sheet(path: Path, run: SuiteRun) -> None:
    """The first picture of each of the first prompts, none of them chosen."""
    from PIL import Image

    pictures = [Image.open(run.picture_file(prompt, 0)) for prompt in run.prompts[:PAGE_PICTURES]]
    with atomic_file(path) as file:
        contact_sheet(pictures, SHEET_COLUMNS, min(PAGE_SIDE, max(run.sampling.size))).save(file, "PNG")


def write_comparison(
    folder: Path, settings: dict[str, Any], sources: list[Source], results: list[list[Result]]
) -> dict:
    """Write scores.json and index.html of every source against the first; returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {}
    for source, mine in zip(sources[1:], results[1:], strict=True):
        pairs = {a.run.suite.name: comparison(a, b) for a, b in zip(results[0], mine, strict=True)}
        table[source.name] = pairs
    data = {"baseline": sources[0].name, "settings": settings, "differences": table}
    write_json(folder / "scores.json", data)
    named = [(s.name, r) for s, r in zip(sources, results, strict=True)]
    write_page(folder / "index.html", data, named)
    return data


def write_page(path: Path, data: dict[str, Any], results: list[tuple[str, list[Result]]]) -> None:
    """A page of its own: tables of `data`, and each suite's first prompts with their first picture by each source."""
    import jinja2

    galleries = []
    for number, first in enumerate(results[0][1]):
        columns = [(name, theirs[number], _verdicts(theirs[number])) for name, theirs in results]
        shown = []
        for prompt in first.run.prompts[:PAGE_PICTURES]:
            pictures = [
                {
                    "source": name,
                    "uri": picture_uri(read_picture(r.run.picture_file(prompt, 0)), PAGE_SIDE),
                    "score": verdicts.get(prompt.id),
                }
                for name, r, verdicts in columns
            ]
            shown.append({"prompt": prompt.text, "kind": prompt.stratum, "pictures": pictures})
        galleries.append({"suite": first.run.suite.name, "primary": first.run.suite.primary, "prompts": shown})
    loader = jinja2.FileSystemLoader([Path(__file__).parent, Path(__file__).parent.parent / "data_pipeline"])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.get_template("scores.html").render(title="Evaluation", data=data, galleries=galleries)
    with atomic_file(path) as file:
        file.write(html.encode())


def _verdicts(result: Result) -> dict[str, float]:
    primary = result.run.suite.primary
    return {r.prompt: r.scores[primary] for r in result.rows if r.kind == "model" and r.index == 0}
