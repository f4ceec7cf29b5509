"""What the filters that look at one sample alone say of it: in curation's first pass, or as it is encoded."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from data_pipeline.filters.description import SampleFilter
from data_pipeline.filters.table import LABELS, find, own_code
from data_pipeline.filters.tools import Tools
from data_pipeline.filters.verdict import Verdict
from data_pipeline.filters.view import View
from data_pipeline.stages import Stage


def judge(view: View, stages: tuple[Stage, ...]) -> Verdict:
    """Run the filters and labels of `stages` on a sample, up to the stage that drops it.

    What lacks a tool is left out, and so are the filters that look at the whole set.
    """
    source = view.sample.meta.get("source", "")
    verdict = Verdict(view.sample.key, source, view.caption, (0, 0), {}, {})
    for stage in stages:
        for rule in stage.rules:
            found = find(rule.filter)
            if isinstance(found, SampleFilter) and rule.applies(source) and not not_run(rule.filter, view.tools):
                verdict = verdict.scored(rule, stage.number, found(view))
            if verdict.dropped_by == "broken":
                return verdict
        if verdict.dropped_by:
            break
        labels = {name: LABELS[name](view) for name in stage.labels if not not_run(name, view.tools)}
        verdict = replace(verdict, labels=verdict.labels | labels)
    return replace(verdict, size=view.image.size)


def not_run(name: str, tools: Tools) -> str | None:
    """Why a filter or label cannot run with these tools; None if it can."""
    needs = (LABELS[name] if name in LABELS else find(name)).needs
    return None if needs is None else tools.missing(needs)


@dataclass(frozen=True)
class InlineFilters:
    """Filters that a producer applies to each sample before it encodes it."""

    stages: tuple[Stage, ...]
    tools: Tools

    def left_out(self) -> dict[str, str]:
        """Why which of them do not run."""
        rules = [rule for stage in self.stages for rule in stage.rules]
        whole = {r.name: "looks at the whole set" for r in rules if not isinstance(find(r.filter), SampleFilter)}
        return whole | {r.name: why for r in rules if (why := not_run(r.filter, self.tools))}

    def settings(self) -> dict[str, Any]:
        """What the decisions depend on, as plain data."""
        stages = [asdict(stage) for stage in self.stages]
        files = sorted(f for f in self.tools.weights.rglob("*") if f.is_file()) if self.tools.weights else []
        weights = [[str(f.relative_to(self.tools.weights)), f.stat().st_size] for f in files]
        return {"stages": stages, "left out": self.left_out(), "own": own_code(self.stages), "weights": weights}

    def __call__(self, view: View) -> Verdict:
        return judge(view, self.stages)
