"""Every filter and label by name. Each describes itself where it is written; a module's are found here."""

from typing import TypeVar

from data_pipeline.filters import caption, file, marks, models, picture, record, text, whole_set
from data_pipeline.filters.description import Label, SampleFilter, SetFilter

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
