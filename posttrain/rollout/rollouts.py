"""Rollouts as stages: prompts -> draw -> score -> credit -> microbatches, one cursor at the rollout's boundary.

A group, all pictures of one prompt, stays on one data-parallel rank. Everything random is keyed by prompt, picture and
pass over the prompts, so a rollout that was cut off is drawn again, bit for bit, from the checkpoint.

Shape legend: G pictures of a group.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.sampling.draw import Request, Sampler, Transition
from model.sampling.guidance import Condition
from model.text_to_image import PIXELS_PER_LATENT, to_uint8
from posttrain.page import Paged
from posttrain.rollout.config import RolloutConfig
from posttrain.rollout.credit import batch_std, group_advantages
from posttrain.rollout.prompts import Prompt, PromptStream, read_prompts
from rewards import WeightedRewards
from training.randomness import Randomness
from training.studio import Studio

if TYPE_CHECKING:
    from rewards import Reward


SHOWN = 8
"""Prompts in samples/."""


@dataclass(frozen=True)
class Group:
    """The pictures of one prompt."""

    prompt: Prompt
    epoch: int
    """Pass over the prompts."""
    condition: Condition
    latents: list[Tensor]
    """fp32 [C, F, H, W], one a picture."""
    images: list[np.ndarray]
    """uint8 [H, W, 3]; dropped once they are scored."""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """fp32 [G] of each reward; "reward" is what is maximised."""
    advantages: Tensor | None = None
    """fp32 [G]"""


class RolloutTrainer(Paged):
    """What an algorithm that learns from its own pictures builds on: a subclass says how they are drawn and used."""

    weights = "policy"
    """Whose pictures: the policy's, or those of a frozen policy."""

    def __init__(self, config: RolloutConfig, studio: Studio, reward: "Reward | None" = None):
        self.config, self.studio = config, studio
        self.reward = reward or WeightedRewards(config.rewards)
        self.prompts = read_prompts(config.prompts)
        self.rng = Randomness(config.loop.seed)

    def sampler(self, prompt: Prompt, epoch: int) -> Sampler:
        """How the pictures of an update are drawn, of which this is the first prompt."""
        raise NotImplementedError

    def microbatches(self, groups: list[Group], transitions: list[Transition]) -> list[list[Any]]:
        """What is trained on: of this rank's groups, or of the random steps of their pictures, numbered on."""
        raise NotImplementedError

    def batches(self) -> "Rollouts":
        return Rollouts(self)

    def shown(self) -> list[Request]:
        conditions = self.studio.conditions(self.captions)
        return [Request(c, self.noise(f"sample-{i}", 0, "sample", Randomness(0))) for i, c in enumerate(conditions)]

    @property
    def captions(self) -> list[str]:
        return [p.text for p in self.prompts[:SHOWN]]

    def start_key(self, prompt: Prompt, picture: int) -> str:
        """What the first noise of a prompt's picture is drawn by."""
        return f"{prompt.key}#{picture}"

    def noise(self, key: str, epoch: int, purpose: str, rng: Randomness | None = None) -> Tensor:
        """The start of a square picture, [16, 1, side, side]."""
        side = self.config.size_px // PIXELS_PER_LATENT
        return (rng or self.rng).normal(key, epoch, purpose, (16, 1, side, side))


class Rollouts:
    """Endless batches of a `RolloutTrainer` (`training.algorithm.Batches`).

    The cursor points at the next rollout; checkpoints lie between two of them.
    """

    def __init__(self, trainer: RolloutTrainer):
        self.trainer, config = trainer, trainer.config
        self._engine = engine = trainer.studio.engine
        if config.prompts_per_update < engine.dp_size:
            raise ValueError(
                f"{config.prompts_per_update} prompts an update leave some of the {engine.dp_size} data-parallel "
                "ranks without a group; raise --prompts-per-update"
            )
        self.stream = PromptStream(trainer.prompts, config.prompts_per_update, config.loop.seed)
        self._microbatches: list[list[Any]] = []
        self._uses_left = 0

    def __next__(self) -> list[list[Any]]:
        if not self._uses_left:
            prompts, engine = next(self.stream), self._engine
            self._microbatches.clear()  # the loop has the list, too: the last pictures leave the device before new ones
            sampler = self.trainer.sampler(*prompts[0])
            groups, transitions = self.draw(prompts[engine.dp_rank :: engine.dp_size], sampler)
            self._microbatches = self.trainer.microbatches(self.credit(self.score(groups)), transitions)
            self._uses_left = self.trainer.config.updates_per_rollout
        self._uses_left -= 1
        return self._microbatches

    @property
    def resumable(self) -> bool:
        """Whether the rollout has had all its updates: it could not be drawn again with the weights of before them."""
        return not self._uses_left

    def state_dict(self) -> dict[str, int]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.stream.load_state_dict(state)
        self._uses_left = 0

    def draw(self, prompts: list[tuple[Prompt, int]], sampler: Sampler) -> tuple[list[Group], list[Transition]]:
        """The pictures of prompts in a pass, and the random steps that led to them."""
        trainer, size = self.trainer, self.trainer.config.group
        painter = trainer.studio.painter(sampler, trainer.weights)
        conditions = [c.to(painter.device) for c in trainer.studio.conditions([p.text for p, _ in prompts])]
        requests = []
        for (prompt, epoch), condition in zip(prompts, conditions, strict=True):
            starts: dict[str, Tensor] = {}  # pictures with one start share its tensor, and so the steps until they part
            for i in range(size):
                key, start = f"{prompt.key}#{i}", trainer.start_key(prompt, i)
                if start not in starts:
                    starts[start] = trainer.noise(start, epoch, "start").to(painter.device)
                requests.append(Request(condition, starts[start], partial(_eps, trainer.rng, key, epoch)))
        drawn, groups = painter.sampler.draw(painter.velocity, requests), []
        for n, ((prompt, epoch), condition) in enumerate(zip(prompts, conditions, strict=True)):
            latents = drawn.latents[n * size : (n + 1) * size]
            images = [to_uint8(picture) for picture in painter.decode(latents)]
            groups.append(Group(prompt, epoch, condition, latents, images))
        return groups, drawn.transitions

    def score(self, groups: list[Group]) -> list[Group]:
        """Rewards of all pictures, asked for at once; of ranks that hold the same pictures, one asks."""
        layout = self._engine.layout
        answer: list[Any] = [None]
        if layout.speaks:
            images = [image for group in groups for image in group.images]
            prompts = [g.prompt for g in groups for _ in g.images]
            scores = self.trainer.reward(images, [p.text for p in prompts], [p.metadata for p in prompts])
            answer = [{name: values.float().tolist() for name, values in scores.items()}]
        for peers in (layout.cp_group, layout.tp_group):
            if peers.size() > 1:
                dist.broadcast_object_list(answer, group=peers, group_src=0)
        size = self.trainer.config.group
        parts = {name: torch.tensor(values).split(size) for name, values in answer[0].items()}
        return [
            replace(group, images=[], scores={name: part[i] for name, part in parts.items()})
            for i, group in enumerate(groups)
        ]

    def credit(self, groups: list[Group]) -> list[Group]:
        """Advantages of the pictures."""
        rewards = torch.stack([group.scores["reward"] for group in groups])
        std = batch_std(rewards, self._sum_over_ranks) if self.trainer.config.advantage_std == "batch" else None
        return [replace(g, advantages=a) for g, a in zip(groups, group_advantages(rewards, std), strict=True)]

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        values = values.to(self._engine.device)
        dist.all_reduce(values, group=self._engine.layout.dp_group)
        return values.cpu()


def _eps(rng: Randomness, key: str, epoch: int, step: int, shape: tuple[int, ...]) -> Tensor:
    return rng.normal(key, epoch, "sde", shape, draw=step)
