"""What the makers of edit pairs return."""

from dataclasses import dataclass

import numpy as np

from data_pipeline.synthesis.typesetting import Line


@dataclass(frozen=True)
class Edit:
    """One edit."""

    before: np.ndarray
    """uint8 [h, w, 3] RGB."""
    after: np.ndarray
    instruction: str
    record: dict
    """operation (recolor, move, remove, add, replace text), of (shapes, page, scene), before and after in words."""
    lines: tuple[Line, ...] = ()
    """Of the picture after the edit."""
