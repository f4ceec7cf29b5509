"""Rewards: what post-training maximises, by name. Heavy libraries are imported when a reward is made, not before.

A reward is a callable `(images: list of uint8 [H, W, 3], prompts, metadata) -> {name: fp32 tensor [B]}`. A reward is
never the judge of what it trained (see evaluation/).
"""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Reward = Callable[[list[np.ndarray], list[str], list[dict]], dict[str, Tensor]]

REWARDS = {
    "shapes": "rewards.shapes:ShapesReward",
    "shapes_soft": "rewards.shapes:ShapesReward",
    "ocr": "rewards.ocr:OCRReward",
}
"""name of a score -> the class that gives it."""


def make_reward(name: str) -> "Reward":
    """The reward that gives the score of this name; ValueError if there is none."""
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}; known are {', '.join(REWARDS)}")
    module, cls = REWARDS[name].split(":")
    return getattr(import_module(module), cls)()


class WeightedRewards:
    """Weighted sum of scores, given as NAME or NAME=WEIGHT; {"reward": the sum, and every score under its own name}."""

    def __init__(self, terms: Iterable[str]):
        self.terms = []
        for term in terms:
            name, _, weight = term.partition("=")
            try:
                self.terms.append((name, float(weight or 1), make_reward(name)))
            except ValueError as error:
                raise ValueError(f"--rewards {term}: {error}") from None
        if not self.terms:
            raise ValueError(f"no reward given; known are {', '.join(REWARDS)}")

    def __call__(self, images: "list[np.ndarray]", prompts: list[str], metadata: list[dict]) -> "dict[str, Tensor]":
        total, scores = 0.0, {}
        for name, weight, reward in self.terms:
            found = reward(images, prompts, metadata)
            total = total + weight * found[name].float()
            scores |= found
        return {"reward": total, **scores}
