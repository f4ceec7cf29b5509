"""Every filter and label by name. Each describes itself where it is written; a module's are found here."""

import inspect
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

from command_line import UserError, load_named
from data_pipeline.filters import caption, file, marks, models, picture, record, text, whole_set
from data_pipeline.filters.description import Filter, Label, SampleFilter, SetFilter
from data_pipeline.stages import Rule, Stage
from files import hash_files

MODULES = (file, picture, caption, text, marks, record, models, whole_set)

Kind = TypeVar("Kind", SampleFilter, SetFilter, Label)


def _all(kind: type[Kind]) -> dict[str, Kind]:
    return {x.name: x for module in MODULES for x in vars(module).values() if isinstance(x, kind)}


FILTERS = _all(SampleFilter)
"""Those that look at one sample by itself."""
SET_FILTERS = _all(SetFilter)
"""Those that look at all samples that the others keep."""
LABELS = _all(Label)
"""What splits the data without dropping any of it."""


@cache
def find(name: str) -> Filter:
    """The filter of a name, or one's own by FILE.py:NAME. UserError if there is none."""
    ours = {**FILTERS, **SET_FILTERS}
    if ":" not in name:
        if name not in ours:
            raise UserError(f"unknown filter {name!r}; known are {', '.join(ours)}, or your own as FILE.py:NAME")
        return ours[name]
    found = load_named(name)
    if not isinstance(found, Filter):
        raise UserError(f"{name} is no filter; it lacks @sample_filter or @set_filter")
    if found.name in ours or found.name != name.rpartition(":")[2]:
        raise UserError(f"{name} is called {found.name}: a filter has the name of its function, and one not taken")
    return found


def own_code(stages: Sequence[Stage]) -> str | None:
    """Hash of the files of one's own filters in some stages; None without any."""
    own = [find(rule.filter) for stage in stages for rule in stage.rules if ":" in rule.filter]
    return hash_files({Path(inspect.getsourcefile(x.score)) for x in own}) if own else None


def rule_of(term: str) -> Rule:
    """The rule of FILTER=THRESHOLD or FILTER=LOW..HIGH; the filter says on which side it keeps. UserError if none."""
    name, equals, bounds = term.rpartition("=")
    found = find(name if equals else term)
    form = "LOW..HIGH" if found.keeps == "between" else "THRESHOLD"
    try:
        least, most = [float(b) for b in bounds.split("..")] if found.keeps == "between" else 2 * [float(bounds)]
    except ValueError:
        raise UserError(f"--filters {term}: expected {name or term}={form}") from None
    return Rule(name, None if found.keeps == "at most" else least, None if found.keeps == "at least" else most)
