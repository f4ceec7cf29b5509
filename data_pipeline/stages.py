"""The stages of curation as data (Qwen-Image report, section 3.2): which filters, with which thresholds.

A recipe is a tuple of stages; a new experiment is a new recipe. Thresholds were measured on photographs with planted
defects (tests/data_pipeline/test_filters.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from command_line import UserError

SYNTHETIC = ("text", "shapes", "square-shapes", "neat-shapes")
"""Sources whose pictures are drawn: plain by design, so the filters for photographs don't apply."""


@dataclass(frozen=True)
class Rule:
    """Keep a sample whose score by `filter` is from `least` to `most`; samples of the `exempt` sources all pass."""

    filter: str
    """Name of one of ours, or one's own as FILE.py:NAME."""
    least: float | None = None
    most: float | None = None
    exempt: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What its scores are called."""
        return self.filter.rpartition(":")[2]

    def keeps(self, score: float | None) -> bool:
        if score is None:
            return True
        return (self.least is None or score >= self.least) and (self.most is None or score <= self.most)

    def applies(self, source: str) -> bool:
        return source not in self.exempt

    def __str__(self) -> str:
        bounds = (("≥", self.least), ("≤", self.most))
        return f"{self.name} " + " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


@dataclass(frozen=True)
class Stage:
    """A step of curation."""

    number: int
    name: str
    rules: tuple[Rule, ...]
    labels: tuple[str, ...] = ()
    """What the data is split by."""
    rare_characters: int = 0
    """Samples are written several times until each letter of the captions comes this often; 0 for never."""


REPORT = (
    Stage(1, "files", (
        Rule("broken", most=0),
        Rule("file_size", least=0.045, exempt=SYNTHETIC),
        Rule("resolution", least=256),
        Rule("aspect_ratio", most=3.2),
        Rule("nsfw", most=0.5),
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
        Rule("token_length", most=1024),
        Rule("clip", least=0.2, exempt=SYNTHETIC),
        Rule("siglip", least=0.05, exempt=SYNTHETIC),
    ), labels=("caption_split",)),
    Stage(4, "text in pictures", (
        Rule("text_area", most=0.6, exempt=SYNTHETIC),
        Rule("smallest_character", least=9.5),
    ), labels=("text_language",)),
    Stage(5, "abnormal elements", (
        Rule("resolution", least=640),
        Rule("qr_code", most=0),
        Rule("barcode", most=0),
        Rule("watermark", most=0, exempt=SYNTHETIC),
        Rule("frame", most=0.1, exempt=SYNTHETIC),
        Rule("abnormal_elements", most=0),
        Rule("aesthetics", least=4.5, exempt=SYNTHETIC),
    )),
    Stage(6, "balance of domains", (
        Rule("domain_excess", most=1),
    ), labels=("domain",)),
    Stage(7, "balance of categories", (
        Rule("category_rank", most=2000),
    ), labels=("category",), rare_characters=100),
)  # fmt: skip
"""As the report orders them. Filters that look at the whole set (duplicate, domain_excess, category_rank) see what all
others keep, so that a copy never replaces what is then dropped. A sideways EXIF orientation is undone when a picture is
decoded, so a user's own pictures may have one."""


def _with(stages: tuple[Stage, ...], **rules: Rule) -> tuple[Stage, ...]:
    return tuple(replace(s, rules=tuple(rules.get(r.filter, r) for r in s.rules)) for s in stages)


TOY = _with(
    REPORT,
    resolution=Rule("resolution", least=48),
    smallest_character=Rule("smallest_character", least=5),
    duplicate=Rule("duplicate", most=0, exempt=(*SYNTHETIC, "photo")),
)

RECIPES = {"report": REPORT, "toy": TOY}
"""toy: for pictures of 128 px and less, whose photographs are overlapping crops of a few, as the demo makes them."""


def chosen_stages(recipe: str, numbers: str, more: Sequence[Rule] = ()) -> tuple[Stage, ...]:
    """The stages of a recipe that `numbers` names, as "1-3,5", and one of `more` rules. UserError if there are none."""
    wanted = _parse(numbers) if numbers else set()
    stages = tuple(stage for stage in RECIPES[recipe] if stage.number in wanted)
    if unknown := wanted - {stage.number for stage in stages}:
        raise UserError(f"the recipe {recipe} has no stage {min(unknown)}; it has 1-{len(RECIPES[recipe])}")
    return (*stages, Stage(len(RECIPES[recipe]) + 1, "more filters", tuple(more))) if more else stages


def _parse(text: str) -> set[int]:
    try:
        ends = [[int(n) for n in part.split("-")] for part in text.split(",")]
        return {n for first, *last in ends for n in range(first, (last or [first])[0] + 1)}
    except ValueError:
        raise UserError(f"--stages takes numbers as in 1-3 or 1,3, not {text!r}") from None
