"""What a filter looks at: one sample, its picture decoded once and brought to forms that several filters share."""

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from PIL.Image import Image

from data_pipeline.filters.ocr import Line, read_lines
from data_pipeline.filters.tools import Tools
from data_pipeline.pictures import decode
from data_pipeline.sample import RawSample

AREA = 640 * 640
"""Pixels to which larger pictures are reduced before they are measured, so that scores mean the same at any size."""


@dataclass(frozen=True)
class View:
    """A raw sample, seen by filters. Its picture is decoded on first use; ValueError if it cannot be."""

    sample: RawSample
    tools: Tools = Tools()

    @property
    def caption(self) -> str:
        return self.sample.meta["caption"]

    @cached_property
    def image(self) -> Image:
        """As it came, upright, RGB."""
        return decode(self.sample.image)

    @cached_property
    def rgb(self) -> np.ndarray:
        """uint8 [h, w, 3] of at most `AREA` pixels."""
        pixels = np.asarray(self.image)
        height, width, _ = pixels.shape
        scale = (AREA / (height * width)) ** 0.5
        if scale >= 1:
            return pixels
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)

    @cached_property
    def gray(self) -> np.ndarray:
        """uint8 [h, w], luma of `rgb` by BT.601."""
        return cv2.cvtColor(self.rgb, cv2.COLOR_RGB2GRAY)

    @cached_property
    def lines(self) -> list[Line]:
        """The text in `rgb`."""
        return read_lines(self.rgb)

    @cached_property
    def histogram(self) -> np.ndarray:
        """[256] share of the pixels at each level of `gray`."""
        return level_shares(self.gray)


def level_shares(values: np.ndarray) -> np.ndarray:
    """[256] share of each value among uint8 values [h, w]."""
    return cv2.calcHist([values], [0], None, [256], [0, 256]).ravel() / max(values.size, 1)
