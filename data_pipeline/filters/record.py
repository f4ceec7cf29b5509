"""What a sample's record tells, from its source or from annotation."""

from data_pipeline.filters.description import label, sample_filter
from data_pipeline.filters.view import View
from data_pipeline.stages import SYNTHETIC


@label()
def caption_split(view: View) -> str:
    """raw (as it came), recaptioned (by a model) or fused (by a model that was shown the raw one)."""
    return view.sample.meta.get("caption_split", "raw")


@label()
def domain(view: View) -> str:
    """nature, design, people or synthetic; unknown until the sample is annotated."""
    drawn = view.sample.meta.get("source") in SYNTHETIC
    return "synthetic" if drawn else view.sample.meta.get("domain", "unknown")


@label()
def category(view: View) -> str:
    """Path in a taxonomy, such as nature/animal/cat; unknown until the sample is annotated."""
    return view.sample.meta.get("category", "unknown")


@sample_filter(keeps="at most", title="abnormal elements that annotation found")
def abnormal_elements(view: View) -> float | None:
    """How many watermarks and other abnormal elements annotation found; None for a sample that isn't annotated."""
    found = view.sample.meta.get("annotation")
    return None if found is None else float(len(found["watermarks"]) + len(found["abnormal_elements"]))
