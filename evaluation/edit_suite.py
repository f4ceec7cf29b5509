"""Editing, measured: is the instruction carried out, and is everything else as it was?

Edits of the shapes world (recolour, move, remove, add). The judge looks at the model's picture and at the true one: the
instruction is carried out if both hold the same objects, each of the same colour and nearly in the same place. What
must not change is compared pixel by pixel outside the true edit's mask. The floor "other" is the picture not edited.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from command_line import UserError
from data_pipeline.synthesis.edit import Edit
from data_pipeline.synthesis.edits import change_mask
from data_pipeline.synthesis.shape_edits import draw_edit
from evaluation.judge import Judge
from evaluation.prompts import Prompt
from evaluation.scoring import Found, Objects
from evaluation.suites import Rows, generator

EDITS = 200
SAME_PLACE = 0.5
"""Least intersection over union of the boxes of one object in two pictures."""
BEST_PSNR = 60.0
"""Pixels that are equal count as this many dB."""


@dataclass
class EditSuite:
    """Edits of pictures of one size (h, w), a function of the size alone; raises UserError for ratios beyond 2:1."""

    size: tuple[int, int]
    judge: Judge = field(default_factory=Judge)
    name = "edit"
    primary = "carried out"
    bounds = (0.0, 1.0)

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
            found, wanted = self.judge([image, edit.after])
            rows["carried out"].append(float(same_objects(found, wanted)))
            outside = change_mask(edit.before, edit.after) == 0
            rows["unchanged outside (dB)"].append(psnr(image[outside], edit.before[outside]))
        return rows

    def truth(self, prompt: Prompt, size: tuple[int, int]) -> np.ndarray:
        return self.edits[prompt.id].after

    def other(self, prompt: Prompt, size: tuple[int, int]) -> np.ndarray:
        return self.edits[prompt.id].before

    def sources(self, prompt: Prompt, size: tuple[int, int]) -> list[np.ndarray]:
        return [self.edits[prompt.id].before]


def _draw(name: str, size: tuple[int, int]) -> Edit:
    rng = generator(Prompt(name, "", "", {}), "edit")
    side = round(math.sqrt(size[0] * size[1]))
    for _ in range(500):
        edit = draw_edit(rng, side)
        if edit.before.shape[:2] == size:
            return edit
    raise UserError(f"there are no edits of {size[0]} x {size[1]} pixels; take a square, or a usual ratio up to 2:1")


def same_objects(a: Objects, b: Objects) -> bool:
    """Whether two pictures hold the same objects: class, colour, and place up to SAME_PLACE."""
    if {name: len(found) for name, found in a.items()} != {name: len(found) for name, found in b.items()}:
        return False
    return all(_match(a[name], b[name]) for name in a)


def _match(found: list[Found], wanted: list[Found]) -> bool:
    left = list(found)
    for w in wanted:
        fitting = [f for f in left if f.color == w.color and overlap(f.box, w.box) >= SAME_PLACE]
        if not fitting:
            return False
        left.remove(max(fitting, key=lambda f: overlap(f.box, w.box)))
    return True


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
