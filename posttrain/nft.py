"""DiffusionNFT: draw pictures, reward them, pull the velocity towards the better ones (arXiv 2509.16117).

    torchrun --nproc-per-node 8 posttrain/nft.py --init runs/dpo --prompts PROMPTS.jsonl --rewards ocr

Pictures are drawn by a copy that follows the policy, without random steps, likelihoods or guidance; training noises
them anew. Run the same command again to go on. Every reduction is in docs/posttraining.md.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

try:
    import tyro

    from command_line import UserError
    from posttrain.rollout.config import RolloutConfig
    from training.cost.step import Work
    from training.engine.config import EngineConfig
    from training.loop import LoopConfig
    from training.start import optimizer, start, toy_optimizer
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config(RolloutConfig):
    cfg_scale: float = 1.0
    """Guidance while drawing; 1 for none, for which the method is made: training never guides."""
    advantage_std: Literal["group", "batch"] = "batch"
    """What a reward's distance from its group's mean is divided by (the authors: all rewards of the update)."""
    advantage_range: float = 5.0
    """The advantage that counts as certainly good; 5 at most, where advantages are clipped."""
    beta: float = 1.0
    """How far the policy stands for the implicit one that is trained; .1 is faster and less stable."""
    kl_weight: float = 1e-4
    """Weight of (v - v_init)^2, averaged over a latent's elements."""
    levels: int = 0
    """Noise levels that a picture is trained at, of the --sampling-steps it was drawn at; 0 for all but one."""
    old_decay_from: int = 0
    """Updates for which the drawing copy is the policy; then its decay rises (the authors' OCR runs: 75)."""
    old_decay_rate: float = 0.001
    """What its decay rises by in an update (OCR: .0075)."""
    old_decay_max: float = 0.5
    """What its decay rises to (OCR: .999); 0 draws with the policy itself."""
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = field(default_factory=lambda: LoopConfig(1000, save_every=50))
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=lambda: optimizer(lr=3e-6))

    NAME: ClassVar = "nft"
    TOY: ClassVar = dict(
        prompts_per_update=2, group=12, levels=3, loop=LoopConfig(10, save_every=5), engine=toy_optimizer(1e-4)
    )  # fmt: skip

    def completed(self) -> "Config":
        if not 0 <= self.levels <= self.sampling_steps:
            raise UserError(f"--levels {self.levels}: pictures are drawn at {self.sampling_steps} noise levels")
        if self.beta <= 0 or not 0 < self.advantage_range <= 5:
            raise UserError("--beta must be above 0, --advantage-range above 0 and at most 5")
        if self.old_decay_from < 0 or self.old_decay_rate < 0 or not 0 <= self.old_decay_max <= 1:
            raise UserError("--old-decay-from and --old-decay-rate aren't negative, --old-decay-max lies in [0, 1]")
        return super().completed()

    def work(self) -> Work:
        """Every picture at some noise levels; the copy that drew it and, for the KL, --init see it too."""
        given, kl = super().work(), int(self.kl_weight > 0)
        levels = self.levels or self.sampling_steps - 1
        return replace(given, samples=given.samples * levels, references=1 + kl, fixed=kl, following=1)


if __name__ == "__main__":
    start(Config, "posttrain.nft:DiffusionNFT")

import math

import torch
from torch import Tensor

from data_pipeline.loader import microbatches as groups_within
from data_pipeline.sample import EncodedSample
from model.packing import ModelInputs, token_size
from model.sampling.draw import Sampler, Transition
from model.sampling.schedule import FixedSchedule, noise_levels
from posttrain.rollout.prompts import Prompt
from posttrain.rollout.rollouts import Group, RolloutTrainer
from training.algorithm import Fixed, Following, Frozen, FrozenPolicy, Metrics, Model
from training.flow_matching import noised, per_sample_mean
from training.randomness import Randomness

SMALLEST_ERROR = 1e-5
"""Mean absolute errors of x0 are taken to be at least this large where they are divided by."""


@dataclass(frozen=True)
class Judged:
    """A picture at one of the noise levels that it is trained at."""

    sample: EncodedSample
    draw: int
    """Which of its levels, counted from 0."""
    advantage: Tensor
    """fp32 scalar"""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """Its rewards, for the log."""


@dataclass(frozen=True)
class Target:
    """What the velocities of a pack are compared with, and what its S pictures earned."""

    velocity: Tensor
    """[n_target, C] eps - x0"""
    advantage: Tensor
    """fp32 [S]"""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """[S] each."""


class DiffusionNFT(RolloutTrainer):
    """Advantage-weighted matching of two implicit policies over batches of `Judged`, as in the authors' code.

    With v of the policy, v_old of the copy that drew, x_s = (1 - s) x0 + s eps, <.> the *mean* over a picture:

        v+ = v_old + beta (v - v_old),   v- = v_old - beta (v - v_old),   e+- = x_s - s v+- - x0   (an error of x0)
        r  = clamp(A / (2 range) + 1/2, 0, 1)
        loss = range / beta (r <e+^2> / sg<|e+|> + (1 - r) <e-^2> / sg<|e-|>) + kl_weight <(v - v_init)^2>

    averaged over pictures and noise levels alike. Where v = v_old a step dv changes the first term by
    -2 s A <e dv> / <|e|>, whatever beta and range: that is what its factor range / beta is for.

    Where the authors' code (NVlabs/DiffusionNFT) and the paper differ, the code is followed, whose settings are known:
    the paper has r = 1/2 + clip(A, -1, 1) / 2, no factor range / beta, and no KL, without which models collapse easily,
    as its authors say. Noise levels are the code's too: those of the sampler's schedule, of which each picture takes
    some at random without repeats (the theory leaves them open). The copy moves after the last update of a rollout, by
    a decay that rises with the updates. Unlike in the code, pictures are drawn by Euler steps instead of a second-order
    solver's, v+- are mixed in fp32, a resumed run goes on with its copy, all weights are trained instead of adapters,
    and the updates of one rollout (several are not the default) all see all of its pictures at the same noise.
    """

    weights = "old"

    @property
    def frozen(self) -> dict[str, FrozenPolicy]:
        old = Following(self.decay, every=self.config.updates_per_rollout)
        return {"old": old} | ({"reference": Fixed()} if self.config.kl_weight else {})

    def decay(self, updates: int) -> float:
        """What the drawing copy keeps of itself after `updates` + 1 updates."""
        config = self.config
        return max(0.0, min((updates + 1 - config.old_decay_from) * config.old_decay_rate, config.old_decay_max))

    def sampler(self, prompt: Prompt, epoch: int) -> Sampler:
        return Sampler(FixedSchedule(self.config.sampling_steps), cfg_scale=self.config.cfg_scale)

    def microbatches(self, groups: list[Group], transitions: list[Transition]) -> list[list[Judged]]:
        """Every picture at every level of its own, in packs of at most `max_tokens`; a larger picture goes alone."""
        config, found = self.config, []
        for group in groups:
            txt = group.condition.txt.cpu()
            for i, latent in enumerate(group.latents):
                sample = EncodedSample(f"{group.prompt.key}#{i}", latent.cpu(), txt, epoch=group.epoch)
                scores = {name: score[i] for name, score in group.scores.items()}
                levels = range(config.levels or config.sampling_steps - 1)
                found += [Judged(sample, draw, group.advantages[i], scores) for draw in levels]
        tokens = [len(j.sample.txt) + math.prod(token_size(j.sample.latent)) for j in found]
        packs = groups_within([min(n, config.max_tokens) for n in tokens], config.max_tokens)
        return [[found[i] for i in sorted(pack, key=tokens.__getitem__)] for pack in packs]

    def sigma(self, judged: Judged, rng: Randomness) -> Tensor:
        """Noise level, fp32 scalar: the draw-th of the schedule's, the final 0 apart, in the picture's own order."""
        sample = judged.sample
        levels = noise_levels(self.config.sampling_steps, math.prod(token_size(sample.latent)))[:-1]
        order = rng.uniform(sample.key, sample.epoch, "levels", tuple(levels.shape)).argsort(stable=True)
        return levels[order[judged.draw]]

    def prepare(self, batch: list[Judged], rng: Randomness, align: int) -> tuple[ModelInputs, Target]:
        samples, sigma = [j.sample for j in batch], torch.stack([self.sigma(j, rng) for j in batch])
        normal = lambda s, draw: rng.normal(s.key, s.epoch, "noise", tuple(s.latent.shape), draw)  # noqa: E731
        noise = [normal(j.sample, j.draw) for j in batch]
        inputs, velocity = noised(samples, [s.txt for s in samples], noise, sigma, align)
        scores = {name: torch.stack([j.scores[name] for j in batch]) for name in batch[0].scores}
        return inputs, Target(velocity, torch.stack([j.advantage for j in batch]), scores)

    def loss(self, model: Model, frozen: Frozen, inputs: ModelInputs, target: Target) -> tuple[Tensor, float, Metrics]:
        config = self.config
        old = frozen["old"](inputs).float()
        reference = frozen["reference"](inputs).float() if config.kl_weight else None
        v = model(inputs).float()
        good = (target.advantage / (2 * config.advantage_range) + 0.5).clamp(0, 1)
        positive, negative = (matching(old + b * (v - old), target, inputs) for b in (config.beta, -config.beta))
        losses = config.advantage_range / config.beta * (good * positive + (1 - good) * negative)
        metrics = {"moved": per_sample_mean((v.detach() - old) ** 2, inputs).sum()}
        if reference is not None:
            kl = per_sample_mean((v - reference) ** 2, inputs)
            losses = losses + config.kl_weight * kl
            metrics["kl"] = kl.detach().sum()
        metrics |= {name: score.sum() for name, score in target.scores.items()}
        return losses.sum(), float(len(losses)), {"loss": losses.detach(), **metrics}


def matching(v: Tensor, target: Target, inputs: ModelInputs) -> Tensor:
    """Squared error of x0 over its detached mean absolute error, mean over a picture's elements: [n_target, C] -> [S].

    At noise level s a velocity off by d makes x0 off by s d, so neither x_s nor x0 is needed.
    """
    error = v - target.velocity
    scale = inputs.sigma * per_sample_mean(error.detach().abs(), inputs)
    return inputs.sigma**2 * per_sample_mean(error**2, inputs) / scale.clamp_min(SMALLEST_ERROR)
