"""The stages of curation as data (Qwen-Image report, section 3.2): which filters, with which thresholds.

A recipe is a tuple of stages; a new experiment is a new recipe. Thresholds were measured on photographs with planted
defects (tests/data_pipeline/test_filters.py).
"""

from dataclasses import dataclass, replace

SYNTHETIC = ("text", "shapes")
"""Sources whose pictures are drawn: plain by design, so the filters for photographs don't apply."""


@dataclass(frozen=True)
class Rule:
    """Keep a sample whose score by `filter` is from `least` to `most`; samples of the `exempt` sources all pass."""

    filter: str
    least: float | None = None
    most: float | None = None
    exempt: tuple[str, ...] = ()

    def keeps(self, score: float) -> bool:
        return (self.least is None or score >= self.least) and (self.most is None or score <= self.most)

    def applies(self, source: str) -> bool:
        return source not in self.exempt

    def __str__(self) -> str:
        bounds = (("≥", self.least), ("≤", self.most))
        return f"{self.filter} " + " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


@dataclass(frozen=True)
class Stage:
    """A step of curation."""

    number: int
    name: str
    rules: tuple[Rule, ...]


REPORT = (
    Stage(1, "files", (
        Rule("broken", most=0),
        Rule("file_size", least=0.045, exempt=SYNTHETIC),
        Rule("resolution", least=256),
        Rule("aspect_ratio", most=3.2),
    )),
    Stage(2, "picture quality", (
        Rule("rotation", most=0, exempt=("user",)),
        Rule("clarity", least=0.61, exempt=SYNTHETIC),
        Rule("luma", least=0.12, most=0.86, exempt=SYNTHETIC),
        Rule("saturation", most=0.33, exempt=SYNTHETIC),
        Rule("entropy", least=1.4, exempt=SYNTHETIC),
        Rule("texture", most=17, exempt=SYNTHETIC),
        Rule("duplicate", most=0, exempt=SYNTHETIC),
    )),
    Stage(3, "captions", (
        Rule("invalid_caption", most=0),
        Rule("caption_words", least=2, most=800),
    )),
)  # fmt: skip
"""As the report orders them. `duplicate` comes last of all, so that a copy never replaces what another filter drops.
A sideways EXIF orientation is undone when a picture is decoded, so a user's own pictures may have one."""


def _with(stages: tuple[Stage, ...], **rules: Rule) -> tuple[Stage, ...]:
    return tuple(replace(s, rules=tuple(rules.get(r.filter, r) for r in s.rules)) for s in stages)


TOY = _with(
    REPORT,
    resolution=Rule("resolution", least=48),
    duplicate=Rule("duplicate", most=0, exempt=(*SYNTHETIC, "photo")),
)

RECIPES = {"report": REPORT, "toy": TOY}
"""toy: for pictures of 128 px and less, whose photographs are overlapping crops of a few, as the demo makes them."""
