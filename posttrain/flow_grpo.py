"""Flow-GRPO: draw groups of pictures, reward them, make the better ones likelier (arXiv 2505.05470).

    torchrun --nproc-per-node 8 posttrain/flow_grpo.py --init runs/dpo --prompts PROMPTS.jsonl --rewards ocr

Each update draws --prompts-per-update prompts, --group pictures of each, with random steps, and takes a clipped policy
gradient with a KL towards --init. Run the same command again to go on. Every reduction is in docs/posttraining.md.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

try:
    import tyro

    from command_line import UserError
    from posttrain.rollout.config import RolloutConfig
    from training.cost.step import Work
    from training.engine.config import EngineConfig, fast_dtype
    from training.loop import LoopConfig
    from training.start import optimizer, start, toy_optimizer
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config(RolloutConfig):
    window: int = 2
    """Random, and trained, steps of a picture: so many in its first half; 0 for all but the last."""
    starts: int | None = None
    """Different first noises in a group. With 1 its pictures differ by their random steps alone, so that an advantage
    tells what these did (as in DanceGRPO and TempFlow-GRPO), not how lucky the start was. Default: each its own."""
    noise_level: float = 0.7
    sde: Literal["flow-grpo", "cps"] = "flow-grpo"
    """How random steps are made: Flow-GRPO's SDE, or coefficients-preserving sampling."""
    ratio: Literal["guard", "likelihood"] = "guard"
    """GRPO-Guard's ratio, which weighs all steps alike, or Flow-GRPO's of likelihoods, where the last ones dominate."""
    clip_range: float = 0.0256
    """Clip range of the ratio, times the square root of a latent's elements: 1e-4 at 512 px (65,536 elements)."""
    beta: float = 0.004
    """Weight of the KL towards --init, averaged over a latent's elements (Flow-GRPO's .04 at 10 steps)."""
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = field(default_factory=lambda: LoopConfig(1000, save_every=50))
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=lambda: optimizer(lr=3e-6))

    NAME: ClassVar = "grpo"
    TOY: ClassVar = dict(
        rewards=("shapes=.5", "shapes_soft=.5"), prompts_per_update=24, group=12, starts=1, advantage_std="batch",
        sampling_steps=8, cfg_scale=1.0, beta=0.001, max_tokens=16384,
        loop=LoopConfig(90, save_every=30), engine=toy_optimizer(3e-4, fast_dtype()),
        sample_every=30, validate_every=90, validation="evaluation.validation:WholeShapesValidation",
    )  # fmt: skip

    def completed(self) -> "Config":
        random_steps(self.sampling_steps, self.window, 0.0)  # refuses what does not fit before anything is written
        if self.starts is not None and not 1 <= self.starts <= self.group:
            raise UserError(f"--starts {self.starts}: a group of {self.group} has from 1 to {self.group} first noises")
        return super().completed()

    def work(self) -> Work:
        """Random steps of all pictures, with guidance, of which the first is one pass for all that start alike; each
        step's latents and mean stay on the device until the next rollout, and so do the prompts' states."""
        given, random = super().work(), len(random_steps(self.sampling_steps, self.window, 0.0))
        passes = random - 1 + (self.starts or self.group) / self.group
        latents = 4 * given.img * self.model.in_channels * (2 * random + 1)
        states = 2 * given.txt * self.model.joint_attention_dim
        return replace(
            given, samples=round(given.samples * passes * self.sides), unit="passes", references=int(self.beta > 0),
            fixed=int(self.beta > 0), remembered=given.samples * (latents + states),
        )  # fmt: skip


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


if __name__ == "__main__":
    start(Config, "posttrain.flow_grpo:FlowGRPO")

import torch
from torch import Tensor

from model.moving import moved
from model.packing import ModelInputs
from model.sampling.draw import Sampler, Transition
from model.sampling.schedule import FixedSchedule
from model.sampling.step import CPS, SDE, Window
from posttrain.rollout.prompts import Prompt
from posttrain.rollout.rollouts import Group, RolloutTrainer
from training.algorithm import Fixed, Frozen, Metrics, Model
from training.randomness import Randomness

NOISE_SHARE = 0.1
"""Largest share of the clip range by which an unchanged policy's ratio may differ from 1."""


@dataclass(frozen=True)
class Credited:
    """A random step of the pictures of a pack, on the engine's device, with what each earned (S pictures)."""

    transition: Transition
    advantage: Tensor
    """fp32 [S]"""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """[S] rewards of the pictures that the step led to, for the log."""


class FlowGRPO(RolloutTrainer):
    """Clipped ratio + beta KL(policy || reference) over batches of one `Credited` step.

    `ratio` is that of the likelihoods, as in Flow-GRPO, or GRPO-Guard's, whose gradient weighs steps alike. With D
    elements a picture, log-probabilities are *means* over D, so the ratio is p^(1/D), whose spread for a given change
    of the policy falls as 1/sqrt(D). Hence `clip_range` is given for D = 1 and divided by sqrt(D): .0256 is Flow-GRPO's
    1e-4 at 512 px (D = 65,536). The KL is that of the two Gaussian steps, (mean - mean_ref)^2 / (2 std^2), *averaged*
    over D; in velocity form |dt|/2 (s (1 - sigma) / (2 sigma) + 1/s)^2 (v - v_ref)^2. Flow-GRPO's code has another
    factor |dt| in it, so its beta .04 at 10 steps is about .004 here.
    """

    _floor_known = False

    @property
    def frozen(self) -> dict[str, Fixed]:
        return {"reference": Fixed()} if self.config.beta else {}

    def start_key(self, prompt: Prompt, picture: int) -> str:
        return super().start_key(prompt, picture % (self.config.starts or self.config.group))

    def sampler(self, prompt: Prompt, epoch: int) -> Sampler:
        config = self.config
        step = {"flow-grpo": SDE, "cps": CPS}[config.sde](config.noise_level)
        at = float(self.rng.uniform(prompt.key, epoch, "window"))
        window = Window(step, random_steps(config.sampling_steps, config.window, at))
        return Sampler(FixedSchedule(config.sampling_steps), window, config.cfg_scale)

    def microbatches(self, groups: list[Group], transitions: list[Transition]) -> list[list[Credited]]:
        device, found = self.studio.engine.device, []
        advantages = torch.cat([group.advantages for group in groups])
        scores = {name: torch.cat([group.scores[name] for group in groups]) for name in groups[0].scores}
        for transition in transitions:
            pictures = list(transition.pictures)
            earned = {name: score[pictures].to(device) for name, score in scores.items()}
            found.append([Credited(transition, advantages[pictures].to(device), earned)])
        if not self._floor_known:
            self._check_noise_floor(transitions)
        return found

    def prepare(self, batch: list[Credited], rng: Randomness, align: int) -> tuple[ModelInputs, Credited]:
        (credited,) = batch
        return credited.transition.inputs(), credited

    def loss(
        self, model: Model, frozen: Frozen, inputs: ModelInputs, credited: Credited
    ) -> tuple[Tensor, float, Metrics]:
        step = credited.transition
        reference = frozen["reference"](inputs) if self.config.beta else None
        mean, std = step.moments(model(inputs))
        log_ratio, clip = self.log_ratio(step, mean, std), self.clip_range(step)
        losses = clipped_ratio_loss(log_ratio, credited.advantage, clip)
        deviation = (log_ratio.detach().exp() - 1).abs() / clip
        metrics = {"ratio_deviation": deviation.sum(), "clipped": (deviation > 1).float().sum()}
        if reference is not None:
            reference_mean, _ = step.moments(reference)
            kl = step.per_picture((mean - reference_mean) ** 2 / (2 * std**2))
            losses = losses + self.config.beta * kl
            metrics["kl"] = kl.detach().sum()
        metrics |= {name: score.sum() for name, score in credited.scores.items()}
        return losses.sum(), float(len(losses)), {"loss": losses.detach().sum(), **metrics}

    def log_ratio(self, step: Transition, mean: Tensor, std: Tensor) -> Tensor:
        """Logarithm of the ratio [S] of the chosen kind, of a policy of these moments."""
        if self.config.ratio == "likelihood":
            return step.mean_log_prob(mean, std) - step.log_prob
        return guarded_log_ratio(step, mean, std)

    def clip_range(self, step: Transition) -> Tensor:
        """The clip range [S] of each picture's ratio."""
        elements = moved(torch.tensor(step.guidance.lengths), step.x.device) * step.x.shape[1]
        return self.config.clip_range / elements.sqrt()

    @torch.no_grad()
    def _check_noise_floor(self, steps: list[Transition]) -> None:
        """Refuse to train where kernels repeat themselves too badly for the clip range, at whichever step."""
        engine, floor = self.studio.engine, 0.0
        for step in steps:  # the later a step, the smaller its std: the last floor may be thirty times the first
            log_ratio = self.log_ratio(step, *step.moments(engine.model(step.inputs())))
            floor = max(floor, ((log_ratio.exp() - 1).abs() / self.clip_range(step)).max().item())
        if engine.any_rank(floor > NOISE_SHARE):
            raise ValueError(
                f"an unchanged policy's ratio is off by {floor:.2g} clip ranges, more than {NOISE_SHARE}: "
                f"raise --clip-range at least {floor / NOISE_SHARE:.1f} times, or train in fp32"
            )
        self._floor_known = True


def clipped_ratio_loss(log_ratio: Tensor, advantage: Tensor, clip: Tensor | float) -> Tensor:
    """PPO's pessimistic surrogate: max(-A r, -A clamp(r, 1 - clip, 1 + clip)), r = exp(log_ratio), elementwise."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def guarded_log_ratio(step: Transition, mean: Tensor, std: Tensor) -> Tensor:
    """The log ratio [S] without its bias and its dependence on the step: noise (mean - mean_old) / |dt|, averaged.

    GRPO-Guard (arXiv 2510.22319): (log p - log p_old + |mean - mean_old|^2 / (2 std^2)) std / |dt|. For Flow-GRPO's
    SDE that is -(1 + a^2/2) noise (v - v_old), so that every step pulls at the velocity with equal force.
    """
    noise, dt = (step.x_next - step.mean) / std, (step.sigma - step.sigma_next).to(mean.device)
    return step.per_picture(noise * (mean - step.mean)) / dt
