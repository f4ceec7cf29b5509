"""Editing, measured: is the instruction carried out, and is everything else as it was?

Edits of the shapes world (recolour, move, remove, add), of pictures whose sets of objects no training edit shows. The
judge looks at the picture before, at the true edit and at the model's: the instruction is carried out if the last two
hold the same objects and nothing else, each of the same colour and nearly in the same place; what was moved or added
may be anywhere in the corner that was named. What must not change is compared pixel by pixel, outside the true edit's
mask and outside the new place of what was moved or added. The floor "other" is the picture not edited.
"""

from dataclasses import dataclass, field

import numpy as np

from command_line import UserError
from data_pipeline.synthesis.edit import Edit
from data_pipeline.synthesis.edits import MASK_MARGIN, change_mask
from data_pipeline.synthesis.shape_edits import draw_held_out_edit
from evaluation.judge import Judge
from evaluation.leftovers import has_leftovers
from evaluation.prompts import Prompt
from evaluation.scoring import Found, Objects
from evaluation.suites import SHARE, Rows, generator

EDITS = 200
SAME_PLACE = 0.5
"""Least intersection over union of the boxes of one object in two pictures."""
CORNER = 0.4
"""Of each side: the share in which an object's centre is in a corner (edits place it within .36)."""
BEST_PSNR = 60.0
"""Pixels that are equal count as this many dB."""


@dataclass
class EditSuite:
    """Edits of pictures of one size (h, w), a function of the size alone.

    Raises UserError for sides below 32 px and ratios beyond 2:1.
    """

    size: tuple[int, int]
    judge: Judge = field(default_factory=Judge)
    name = "edit"
    primary = "carried out"
    bounds = {"carried out": SHARE}

    def __post_init__(self):
        self.fingerprint = self.judge.fingerprint
        self.edits = {f"edit/{i:04d}": _draw(f"edit/{i:04d}", self.size) for i in range(EDITS)}
        self.prompts = [
            Prompt(name, e.instruction, e.record["operation"], {k: e.record[k] for k in ("before", "after")})
            for name, e in self.edits.items()
        ]

    def score(self, images: list[np.ndarray], prompts: list[Prompt]) -> Rows:
        rows: Rows = {"carried out": [], "unchanged outside (dB)": []}
        for image, prompt in zip(images, prompts, strict=True):
            edit = self.edits[prompt.id]
            found, before, after = self.judge([image, edit.before, edit.after])
            right = is_carried_out(prompt.stratum, found, before, after, self.size) and not has_leftovers(image, found)
            rows["carried out"].append(float(right))
            outside = change_mask(edit.before, edit.after) == 0
            if prompt.stratum in ("move", "add"):
                outside &= ~_new_places(found, before, outside.shape)
            rows["unchanged outside (dB)"].append(psnr(image[outside], edit.before[outside]))
        return rows

    def truth(self, prompt: Prompt, size: tuple[int, int]) -> np.ndarray:
        return self.edits[prompt.id].after

    def other(self, prompt: Prompt, size: tuple[int, int]) -> np.ndarray:
        return self.edits[prompt.id].before

    def sources(self, prompt: Prompt, size: tuple[int, int]) -> list[np.ndarray]:
        return [self.edits[prompt.id].before]

    def constants(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        return {}


def _draw(name: str, size: tuple[int, int]) -> Edit:
    if max(size) > 2 * min(size) or min(size) < 32:
        raise UserError(f"there are no edits of {size[0]} x {size[1]} pixels; take sides from 32 px, a ratio up to 2:1")
    return draw_held_out_edit(generator(Prompt(name, "", "", {}), "edit"), size)


def is_carried_out(operation: str, found: Objects, before: Objects, after: Objects, size: tuple[int, int]) -> bool:
    """Whether a picture of `size` (h, w) holds the objects `found` that an edit of `before` should leave.

    These are the objects of the true edit `after`: class, colour, and place up to SAME_PLACE. What was moved or added
    may stand anywhere in the corner that was named; what was moved keeps its size.
    """
    if {name: len(group) for name, group in found.items()} != {name: len(group) for name, group in after.items()}:
        return False

    def fits(name: str, f: Found, w: Found) -> bool:
        if f.color != w.color:
            return False
        if operation not in ("move", "add") or _stays(name, w, before):
            return overlap(f.box, w.box) >= SAME_PLACE
        large = operation == "add" or overlap(_centred(f), _centred(w)) >= SAME_PLACE
        return large and corner(f, size) == corner(w, size) and not _stays(name, f, before)

    for name, group in after.items():
        left = list(found[name])
        for w in sorted(group, key=lambda w: not _stays(name, w, before)):
            fitting = [f for f in left if fits(name, f, w)]
            if not fitting:
                return False
            left.remove(max(fitting, key=lambda f: overlap(f.box, w.box)))
    return True


def _new_places(found: Objects, before: Objects, size: tuple[int, int]) -> np.ndarray:
    """bool [h, w]: where objects stand, with MASK_MARGIN pixels around, that weren't there before."""
    mask = np.zeros(size, bool)
    for f in (f for name, group in found.items() for f in group if not _stays(name, f, before)):
        x0, y0, x1, y1 = (round(v) for v in f.box)
        mask[max(y0 - MASK_MARGIN, 0) : y1 + MASK_MARGIN, max(x0 - MASK_MARGIN, 0) : x1 + MASK_MARGIN] = True
    return mask


def corner(found: Found, size: tuple[int, int]) -> tuple[int | None, int | None]:
    """(row, column), 0 or 1, of the corner of a picture of `size` (h, w) where an object is; None in the middle."""
    x0, y0, x1, y1 = found.box
    shares = ((y0 + y1) / 2 / size[0], (x0 + x1) / 2 / size[1])
    return tuple(0 if share < CORNER else 1 if share > 1 - CORNER else None for share in shares)


def _stays(name: str, found: Found, before: Objects) -> bool:
    """Whether an object is where one of its class and colour was before."""
    return any(b.color == found.color and overlap(b.box, found.box) >= SAME_PLACE for b in before.get(name, ()))


def _centred(found: Found) -> tuple[float, ...]:
    x0, y0, x1, y1 = found.box
    return (x0 - x1) / 2, (y0 - y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes [x0, y0, x1, y1]."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return shared / (sum(areas) - shared)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pixels, at most BEST_PSNR."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return BEST_PSNR if error == 0 else min(BEST_PSNR, float(10 * np.log10(255**2 / error)))
