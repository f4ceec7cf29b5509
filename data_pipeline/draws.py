"""What a stage of training draws, as data: shares of classes of samples and least scores, as curves over the stage.

Imports neither torch nor numpy, for `--help`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise

from command_line import UserError
from data_pipeline.classes import SOURCE, TEXT

Curve = tuple[tuple[float, float], ...]
"""Points (fraction of the stage, value), linear between, level before the first and after the last."""


def curve(value: object, where: str) -> Curve:
    """The curve that a number, or [fraction, value] pairs, say. UserError names `where` if it is neither."""
    points = value if isinstance(value, Sequence) and not isinstance(value, str) else [(0, value)]
    try:
        found = tuple((float(fraction), float(height)) for fraction, height in points)
    except (TypeError, ValueError):
        found = ()
    if not found or not all(0 <= f <= 1 for f, _ in found) or any(b <= a for (a, _), (b, _) in pairwise(found)):
        raise UserError(
            f"{where} = {value!r} is no curve: give a number, or points as in [[0, 0.2], [1, 0.5]], whose first "
            "numbers rise from 0 to 1"
        )
    return found


def height(points: Curve, fraction: float) -> float:
    """Value of a curve."""
    for (a, low), (b, high) in pairwise(points):
        if a <= fraction <= b:
            value = low + (high - low) * (fraction - a) / (b - a)
            return min(max(value, min(low, high)), max(low, high))  # rounding leaves the segment
    return points[0][1] if fraction < points[0][0] else points[-1][1]


@dataclass(frozen=True)
class Draws:
    """Curves by name; an empty table leaves that as it is in the data.

    Shares are relative to their sum; a class that a table doesn't name is not drawn. UserError for what is no curve, no
    share or no class.
    """

    resolutions: dict[str, Curve] = field(default_factory=dict)
    """Share of the compute (FLOPs) of each resolution, by its stage: {"640": .5, "1328": .5}. Default: the stage's
    own alone."""
    minimum: dict[str, Curve] = field(default_factory=dict)
    """Least score by filter; samples that the filter gave none pass, as in curation."""
    text: dict[str, Curve] = field(default_factory=dict)
    """Share of samples by the text in their picture: none, words, sentences, paragraphs."""
    source: dict[str, Curve] = field(default_factory=dict)
    """Share of samples that are real or synthetic."""
    domain: dict[str, Curve] = field(default_factory=dict)
    """Share of each domain (nature, people, design, unknown, ...) among the samples that are real."""

    def __post_init__(self):
        for table in fields(self):
            given = getattr(self, table.name)
            if not isinstance(given, Mapping):
                raise UserError(f"draws.{table.name} should be a table of curves, is {given!r}")
            curves = {name: curve(value, f"draws.{table.name}.{name}") for name, value in given.items()}
            object.__setattr__(self, table.name, curves)
        for table, classes in (("text", TEXT), ("source", SOURCE)):
            if unknown := sorted(set(getattr(self, table)) - set(classes)):
                raise UserError(f"draws.{table}: unknown name {', '.join(unknown)}; known are {', '.join(classes)}")
        for table in ("resolutions", "text", "source", "domain"):
            curves = getattr(self, table).values()
            if any(share < 0 for points in curves for _, share in points):
                raise UserError(f"draws.{table}: shares are at least 0")
            if curves and not all(any(height(points, f) for points in curves) for f in self.fractions()):
                raise UserError(f"draws.{table}: at every moment some share is above 0")

    def __bool__(self) -> bool:
        """Whether anything is drawn otherwise than it lies in the data."""
        return any(getattr(self, table.name) for table in fields(self))

    def __str__(self) -> str:
        """The curves in words: "text none 1@0 0.6@1, words ...; minimum clip 0.2"."""
        said = []
        for table in fields(self):
            curves = getattr(self, table.name).items()
            words = [
                f"{name} {points[0][1]:g}" if len(points) == 1 else
                f"{name} " + " ".join(f"{value:g}@{fraction:g}" for fraction, value in points)
                for name, points in curves
            ]  # fmt: skip
            said += [f"{table.name} {', '.join(words)}"] if words else []
        return "; ".join(said) or "every sample as often as any other"

    def curves(self) -> dict[str, Curve]:
        """All curves by TABLE.NAME."""
        tables = {table.name: getattr(self, table.name) for table in fields(self)}
        return {f"{table}.{name}": points for table, curves in tables.items() for name, points in curves.items()}

    @property
    def moves(self) -> bool:
        """Whether the length of a stage matters for what it draws."""
        return any(value != points[0][1] for points in self.curves().values() for _, value in points)

    def fractions(self) -> tuple[float, ...]:
        """All moments, ascending, at which a curve may bend."""
        return tuple(sorted({0.0, 1.0} | {fraction for points in self.curves().values() for fraction, _ in points}))
