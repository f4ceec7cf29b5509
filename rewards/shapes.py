"""Reward for the shapes world: credit for what the prompt asked, by what a detector finds in the picture.

Unlike GenEval's rule, objects that nobody asked for cost credit: a little of everything, drawn whatever is asked, earns
less than the right object alone.
"""

from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from data_pipeline.synthesis.shapes_world import COLORS, SHAPES
from rewards.shapes_detector import Detection, detect

SURPLUS = 0.5
"""What is left of the soft credit after each object too many; an object up to the wanted number costs nothing, so that
a model which draws too few can learn to try."""


def _relation(a: Detection, b: Detection, relation: str) -> float:
    """How far a lies in `relation` to b, in [-1, 1]: GenEval's offset, shrunk by .1 x sizes; above .5 it holds."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.box, b.box
    offset = np.array([ax0 + ax1 - bx0 - bx1, ay0 + ay1 - by0 - by1]) / 2
    sizes = np.array([ax1 - ax0 + bx1 - bx0, ay1 - ay0 + by1 - by0])
    direction = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * sizes, 0) / max(np.linalg.norm(offset), 1e-6)
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    return float(sign * direction[axis])


def credit(detections: list[Detection], metadata: dict[str, Any]) -> tuple[float, float]:
    """(strict, soft) credit of a picture for its prompt, both in [0, 1].

    Wanted objects are assigned to detections by how well shape and colour fit. Soft credit is the mean fit over the
    wanted objects, so that an empty picture gets 0; it is halved (SURPLUS) for every object found beyond their number,
    and a wanted relation scales it between a half and one. Strict credit is 1 if every object is right, none is
    superfluous and the relation holds.
    """
    wanted = [(i, c) for i, c in enumerate(metadata["include"]) for _ in range(c["count"])]
    if not detections:
        return 0.0, 0.0
    fit = np.zeros((len(wanted), len(detections)))
    for row, (_, clause) in enumerate(wanted):
        for column, d in enumerate(detections):
            fit[row, column] = d.shape_p[SHAPES.index(clause["class"])]
            if "color" in clause:
                fit[row, column] = (fit[row, column] + d.color_p[list(COLORS).index(clause["color"])]) / 2
    rows, columns = linear_sum_assignment(fit, maximize=True)
    soft = fit[rows, columns].sum() / len(wanted) * SURPLUS ** max(0, len(detections) - len(wanted))
    strict = len(wanted) == len(detections) and all(
        detections[c].shape == wanted[r][1]["class"] and wanted[r][1].get("color") in (None, detections[c].color)
        for r, c in zip(rows, columns, strict=True)
    )
    assigned = {r: c for r, c in zip(rows, columns, strict=True) if fit[r, c] > 0.25}
    for i, clause in enumerate(metadata["include"]):
        if "position" in clause:
            relation, target = clause["position"]
            values = [
                _relation(detections[assigned[r]], detections[assigned[t]], relation)
                for r in assigned
                for t in assigned
                if wanted[r][0] == i and wanted[t][0] == target
            ]
            worst = min(values, default=-1.0)
            soft *= 0.5 + 0.5 * float(np.clip(worst + 0.5, 0, 1))
            strict = strict and worst > 0.5
    return float(strict), float(soft)


class ShapesReward:
    """`(images, prompts, metadata) -> {"shapes": strict, "shapes_soft": soft}`, each fp32 [B] in [0, 1].

    Images are uint8 [h, w, 3] of any size from 64 px; metadata is GenEval's, with the shapes world's classes. Raises
    ValueError for metadata of another world, or without a list of wanted objects.
    """

    def __call__(
        self, images: list[np.ndarray], prompts: list[str], metadata: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        for prompt, m in zip(prompts, metadata, strict=True):
            if not m.get("include"):
                raise ValueError(f"the shapes reward needs the wanted objects (include) of {prompt!r}; see --rewards")
            for clause in m["include"]:
                if clause["class"] not in SHAPES or clause.get("color", "red") not in COLORS:
                    raise ValueError(f"the shapes reward doesn't know {clause} of {prompt!r}")
        credits = [credit(detect(image), m) for image, m in zip(images, metadata, strict=True)]
        strict, soft = torch.tensor(credits, dtype=torch.float32).reshape(-1, 2).unbind(1)
        return {"shapes": strict, "shapes_soft": soft}
