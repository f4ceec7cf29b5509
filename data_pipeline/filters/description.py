"""What a filter says of itself, where it is written: its name, what it needs, how its score is compared, its title.

    @sample_filter(keeps="at most", title="share of grey pixels")
    def greyness(view: View) -> float:
        ...

A recipe's `Rule` names the filter and gives the threshold.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

    from data_pipeline.filters.verdict import Verdict
    from data_pipeline.filters.view import View

Side = Literal["at least", "at most", "between"]


@dataclass(frozen=True)
class Filter:
    """A score, and where it lies for samples that are kept. Called as the function that it was made of."""

    name: str
    score: Callable[..., Any]
    keeps: Side
    """Samples whose score is at least, or at most, a rule's threshold, or between two."""
    title: str
    """What the score means, on the audit's page."""
    needs: str | None = None
    """The tool without which it isn't run (see `Tools.missing`)."""

    def __call__(self, *given: Any) -> Any:
        return self.score(*given)


class SampleFilter(Filter):
    """Looks at one sample by itself: `score(view)`, None where there is nothing to score, which every rule keeps."""


class SetFilter(Filter):
    """Looks at all samples that the others keep, in the order of a recipe's rules.

    `score(verdicts, thumbnail)` gives (score, reason) of each; `thumbnail(i)` is the i-th one's, uint8 [32, 32, 3].
    """


@dataclass(frozen=True)
class Label:
    """What the data is split by, without dropping any of it."""

    name: str
    read: Callable[["View"], str]
    needs: str | None = None

    def __call__(self, view: "View") -> str:
        return self.read(view)


def sample_filter(
    keeps: Side, title: str, needs: str | None = None
) -> Callable[[Callable[["View"], float | None]], SampleFilter]:
    """A function of a view as a filter of its name."""
    return lambda score: SampleFilter(score.__name__, score, keeps, title, needs)


def set_filter(
    keeps: Side, title: str
) -> Callable[[Callable[[list["Verdict"], Callable[[int], "np.ndarray"]], list[tuple[float | None, str]]]], SetFilter]:
    """A function of verdicts and thumbnails as a filter of its name."""
    return lambda score: SetFilter(score.__name__, score, keeps, title)


def label(needs: str | None = None) -> Callable[[Callable[["View"], str]], Label]:
    """A function of a view as a label of its name."""
    return lambda read: Label(read.__name__, read, needs)
