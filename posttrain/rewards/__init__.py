"""Rewards: what post-training maximises, by name. Heavy libraries are imported when a reward is made, not before.

A reward is a callable `(images: list of uint8 [H, W, 3], prompts, metadata) -> {name: fp32 tensor [B]}`. A reward is
never the judge of what it trained (see evaluation/).
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Reward = Callable[[list[np.ndarray], list[str], list[dict]], dict[str, Tensor]]

REWARDS = {
    "shapes": "posttrain.rewards.shapes:ShapesReward",
    "ocr": "posttrain.rewards.ocr:OCRReward",
}


def make_reward(name: str) -> "Reward":
    """The reward of this name; ValueError if there is none."""
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}; known are {', '.join(REWARDS)}")
    module, cls = REWARDS[name].split(":")
    return getattr(import_module(module), cls)()


class WeightedRewards:
    """Weighted sum of several rewards; {"reward": the sum, and every term under its own name}."""

    def __init__(self, weights: dict[str, float]):
        if not weights:
            raise ValueError(f"no reward given; known are {', '.join(REWARDS)}")
        self.terms = [(name, weight, make_reward(name)) for name, weight in weights.items()]

    def __call__(self, images: "list[np.ndarray]", prompts: list[str], metadata: list[dict]) -> "dict[str, Tensor]":
        total, scores = 0.0, {}
        for name, weight, reward in self.terms:
            found = reward(images, prompts, metadata)
            total = total + weight * found[name].float()
            scores |= found
        return {"reward": total, **scores}
