"""Rollouts: pictures drawn with random steps, of which each keeps what a policy gradient needs.

A trajectory is a chain of Gaussian steps x_k -> x_{k+1} (model/sampling/sampler.py), so its probability under any
policy is known exactly: that makes a sampler of the flow into a policy (Flow-GRPO, arXiv 2505.05470). Latents and
log-probabilities stay in fp32, and a step is trained in the very pack in which it was drawn: on an unchanged policy the
ratio of probabilities is then one, up to what the kernels themselves cannot repeat.

Shape legend: S pictures of one pack, L target tokens of all of them, C channels of a token.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import epoch_order
from model.flow import schedule
from model.packing import ModelInputs, patchify, token_size, unpatchify
from model.sampling.sampler import SDE, Guidance, Velocity, log_prob, sde_moments
from model.text_to_image import PIXELS_PER_LATENT, TextToImage, to_uint8
from posttrain.advantages import batch_std, group_advantages
from posttrain.prompts import Prompt
from training.randomness import Randomness

if TYPE_CHECKING:
    from posttrain.objectives import FlowGRPO
    from rewards import Reward
    from training.engine.step import Engine

NOISE_SHARE = 0.1
"""Largest share of the clip range by which an unchanged policy's ratio may differ from 1."""


@dataclass(frozen=True)
class Transition:
    """One random step of the pictures of a pack."""

    guidance: Guidance
    x: Tensor
    """fp32 [L, C] before the step."""
    x_next: Tensor
    """fp32 [L, C] after it."""
    sigma: Tensor
    """[S] noise level before the step, on the CPU."""
    sigma_next: Tensor
    sigma_max: Tensor
    """[S] second level of the schedule (see `sde_moments`)."""
    noise_level: float
    kind: SDE
    mean: Tensor
    """fp32 [L, C] mean of the step of the policy that drew it."""
    log_prob: Tensor
    """fp32 [S] under that policy."""
    advantage: Tensor
    """fp32 [S]"""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """[S] rewards of the pictures that the step led to, for the log."""

    def inputs(self) -> ModelInputs:
        return self.guidance.inputs(self.x, self.sigma)

    def moments(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [L, C] and standard deviation [L, 1] of the step of a policy whose model answered `output`."""
        levels = (self.guidance.per_token(s.to(self.x.device)) for s in (self.sigma, self.sigma_next, self.sigma_max))
        sigma, sigma_next, sigma_max = levels
        v = self.guidance.combine(output.float())
        return sde_moments(self.x, v, sigma, sigma_next, self.noise_level, sigma_max, self.kind)

    def log_ratio(self, mean: Tensor, std: Tensor) -> Tensor:
        """How much likelier a policy of these moments makes the step than the one that drew it, [S].

        log p - log p_old, averaged over D.
        """
        return self.mean_log_prob(mean, std) - self.log_prob

    def guarded_log_ratio(self, mean: Tensor, std: Tensor) -> Tensor:
        """The same without its bias and its dependence on the step's size: noise (mean - mean_old) / |dt|, averaged.

        GRPO-Guard (arXiv 2510.22319): (log p - log p_old + |mean - mean_old|^2 / (2 std^2)) std / |dt|. For Flow-GRPO's
        SDE that is -(1 + a^2/2) noise (v - v_old), so that every step pulls at the velocity with equal force.
        """
        noise, dt = (self.x_next - self.mean) / std, (self.sigma - self.sigma_next).to(mean.device)
        return self.per_picture(noise * (mean - self.mean)) / dt

    def mean_log_prob(self, mean: Tensor, std: Tensor) -> Tensor:
        """Log density of the step, *averaged* over a picture's tokens and channels: [S]."""
        return self.per_picture(log_prob(self.x_next, mean, std))

    def per_picture(self, values: Tensor) -> Tensor:
        """Mean over tokens and channels: [L, C] -> [S]."""
        return torch.stack([piece.mean() for piece in self.guidance.split(values)])


def random_steps(steps: int, window: int, start: float) -> range:
    """Which of a trajectory's steps are random: all but the last, or `window` consecutive ones of the first half.

    `start` in [0, 1) picks the window's place. The last step is never random: noise left in x0 would be seen, and a
    CPS step to sigma = 0 has no density. Raises ValueError for a window that does not fit.
    """
    if not window:
        return range(steps - 1)
    last = max(steps // 2, window)
    if not 0 < window <= steps - 1:
        raise ValueError(
            f"a window of {window} random steps does not fit into {steps} steps, of which the last is fixed"
        )
    first = int(start * (last - window + 1))
    return range(first, first + window)


@torch.no_grad()
def rollout(
    velocity: Velocity,
    guidance: Guidance,
    noise: list[Tensor],
    draw: Callable[[int, int, tuple[int, ...]], Tensor],
    steps: int,
    random: Collection[int],
    noise_level: float,
    kind: SDE = "flow-grpo",
) -> tuple[list[Tensor], list[Transition]]:
    """Draw the pictures of a pack from `noise` [C, F, H, W]; returns their latents and their random steps.

    Step k of `steps` is random if k is in `random`, with the standard normal `draw(picture, k, shape)`, and the ODE's
    otherwise. Advantages are left at 0 for the caller to fill in.
    """
    sizes = [token_size(n) for n in noise]
    x = torch.cat([patchify(n.float()) for n in noise])
    sigmas = torch.stack([schedule(steps, math.prod(size)) for size in sizes])
    transitions = []
    for k in range(steps):
        step = Transition(
            guidance, x, x, sigmas[:, k], sigmas[:, k + 1], sigmas[:, 1], noise_level if k in random else 0.0, kind,
            mean=x, log_prob=x.new_zeros(len(noise)), advantage=x.new_zeros(len(noise)),
        )  # fmt: skip
        mean, std = step.moments(velocity(step.inputs()))
        x = mean
        if k in random:
            eps = [draw(i, k, tuple(piece.shape)) for i, piece in enumerate(guidance.split(mean))]
            x = mean + std * torch.cat(eps).to(mean.device)
            step = replace(step, x_next=x, mean=mean)
            transitions.append(replace(step, log_prob=step.mean_log_prob(mean, std)))
    return [unpatchify(t, size) for t, size in zip(guidance.split(x), sizes, strict=True)], transitions


@dataclass
class Rollouts:
    """Endless updates of Flow-GRPO: this rank's groups of pictures, drawn by the engine's present weights and scored.

    Yields the random steps of the pictures as microbatches of one `Transition`. A group, all pictures of one prompt,
    stays on one rank. Everything random is keyed by prompt, picture and pass over the prompts, so a rollout that was
    cut off is drawn again, bit for bit, from the checkpoint. The cursor points at the next rollout: an interruption
    between two updates of one rollout (with `updates_per_rollout` > 1) skips what is left of it.
    """

    engine: "Engine"
    artist: TextToImage
    """Its `velocity` is the engine's present policy."""
    reward: "Reward"
    """Pictures to scores; its "reward" is maximised."""
    objective: "FlowGRPO"
    prompts: list[Prompt]
    prompts_per_update: int
    group: int
    """Pictures of each prompt."""
    size_px: int
    steps: int
    cfg_scale: float
    noise_level: float
    kind: SDE
    window: int
    max_tokens: int
    """Tokens of a pack (a group may take several)."""
    advantage_std: Literal["group", "batch"]
    updates_per_rollout: int
    seed: int

    def __post_init__(self):
        if self.prompts_per_update < self.engine.dp_size:
            raise ValueError(
                f"{self.prompts_per_update} prompts an update leave some of the {self.engine.dp_size} data-parallel "
                "ranks without a group; raise --prompts-per-update"
            )
        self.rng = Randomness(self.seed)
        self._cursor = (0, 0)
        self._rollout: list[list[Transition]] = []
        self._uses_left = 0
        self._floor_known = False

    def __next__(self) -> list[list[Transition]]:
        if not self._uses_left:
            self._rollout, self._uses_left = self._draw(), self.updates_per_rollout
        self._uses_left -= 1
        return self._rollout

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._cursor[0], "index": self._cursor[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._cursor, self._uses_left = (state["epoch"], state["index"]), 0

    def _draw(self) -> list[list[Transition]]:
        mine = self._next_prompts()[self.engine.dp_rank :: self.engine.dp_size]
        groups = [self._draw_group(prompt, epoch) for prompt, epoch in mine]
        rewards = torch.stack([scores["reward"] for _, scores in groups])
        std = batch_std(rewards, self._sum_over_ranks) if self.advantage_std == "batch" else None
        microbatches = []
        for (packs, scores), advantages in zip(groups, group_advantages(rewards, std), strict=True):
            taken = 0
            for transitions in packs:
                part = slice(taken, taken := taken + len(transitions[0].log_prob))
                mine = {name: s[part].to(self.engine.device) for name, s in scores.items()}
                advantage = advantages[part].to(self.engine.device)
                microbatches += [[replace(t, advantage=advantage, scores=mine)] for t in transitions]
        if not self._floor_known:
            self._check_noise_floor(microbatches[0][0])
        return microbatches

    def _next_prompts(self) -> list[tuple[Prompt, int]]:
        """(prompt, epoch) of all ranks' groups of the next rollout; moves the cursor."""
        (epoch, index), places = self._cursor, []
        while len(places) < self.prompts_per_update:
            order = epoch_order(len(self.prompts), self.seed, epoch)
            taken = order[index : index + self.prompts_per_update - len(places)]
            places += [(self.prompts[i], epoch) for i in taken]
            index += len(taken)
            if index == len(order):
                epoch, index = epoch + 1, 0
        self._cursor = (epoch, index)
        return places

    def _draw_group(self, prompt: Prompt, epoch: int) -> tuple[list[list[Transition]], dict[str, Tensor]]:
        """The random steps of each pack of a group, and the scores [group] of its pictures."""
        side = self.size_px // PIXELS_PER_LATENT
        (condition,) = self.artist.encode([prompt.text])
        tokens = (side // 2) ** 2 + len(condition.txt)
        width = max(1, min(self.group, self.max_tokens // (tokens * (2 if self.cfg_scale > 1 else 1))))
        random = random_steps(self.steps, self.window, float(self.rng.uniform(prompt.key, epoch, "window")))
        packs, images = [], []
        for first in range(0, self.group, width):
            keys = [f"{prompt.key}#{i}" for i in range(first, min(first + width, self.group))]
            noise = [self.rng.normal(k, epoch, "start", (16, 1, side, side)).to(self.engine.device) for k in keys]
            size = token_size(noise[0])
            latents, transitions = rollout(
                self.artist.velocity,
                Guidance([condition] * len(keys), [size] * len(keys), self.cfg_scale, self.engine.align),
                noise,
                lambda i, k, shape, keys=keys: self.rng.normal(keys[i], epoch, "sde", shape, draw=k),
                self.steps, random, self.noise_level, self.kind,
            )  # fmt: skip
            packs.append(transitions)
            images += [to_uint8(self.artist.decode(latent)) for latent in latents]
        scores = self.reward(images, [prompt.text] * self.group, [prompt.metadata] * self.group)
        return packs, {name: self._agreed(score.float()) for name, score in scores.items()}

    def _agreed(self, scores: Tensor) -> Tensor:
        """The first peer's scores: peers hold one picture, but a reward need not be bitwise repeatable."""
        for peers in (self.engine.layout.tp_group, self.engine.layout.cp_group):
            if peers.size() > 1:
                scores = scores.to(self.engine.device)
                dist.broadcast(scores, group=peers, group_src=0)
        return scores.cpu()

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        values = values.to(self.engine.device)
        dist.all_reduce(values, group=self.engine.layout.dp_group)
        return values.cpu()

    def _check_noise_floor(self, transition: Transition) -> None:
        """Refuse to train where kernels repeat themselves too badly for the clip range."""
        log_ratio = self.objective.log_ratio(transition, *transition.moments(self.engine.model(transition.inputs())))
        floor = ((log_ratio.exp() - 1).abs() / self.objective.clip_range(transition)).max().item()
        if self.engine.any_rank(floor > NOISE_SHARE):
            raise ValueError(
                f"an unchanged policy's ratio is off by {floor:.2g} clip ranges, more than {NOISE_SHARE}: "
                f"raise --clip-range at least {floor / NOISE_SHARE:.1f} times, or train in fp32"
            )
        self._floor_known = True
