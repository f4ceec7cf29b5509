"""The objectives of post-training: direct preferences (DPO) and policy gradients (Flow-GRPO).

Both follow the contract of `training.objective`. Formulas and every reduction are stated in docs/posttraining.md.

Shape legend: S samples of a microbatch, N target tokens, C channels of a token.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.flow import interpolate, velocity
from model.packing import ModelInputs, pack_inputs, patchify
from posttrain.preference import Pair
from posttrain.rollout import Transition
from training.objective import Frozen, Metrics, per_sample_mean
from training.randomness import Randomness


def dpo_loss(errors: Tensor, reference_errors: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """-log sigmoid(-beta ((win - lose) - (reference win - reference lose))) -> (losses [S], margins [S]).

    errors [2, S]: squared velocity errors (win, lose), each the *mean* over the elements of a latent. The margin is how
    much more the policy gained on the winner than on the loser, in the same unit. With a sum over D elements
    the same beta would be D times as strong; Diffusion-DPO's code (arXiv 2311.12908) writes beta / 2 before the same
    mean, so its 5000 is 2500 here. Source: Qwen-Image report, section 5.2.1.
    """
    (win, lose), (reference_win, reference_lose) = errors, reference_errors
    margin = (reference_win - win) - (reference_lose - lose)
    return -F.logsigmoid(beta * margin), margin


@dataclass(frozen=True)
class DiffusionDPO:
    """Diffusion-DPO for flow matching over batches of `Pair`, against frozen("reference").

    Winner and loser share noise level and noise, and so do policy and reference: what a pair contributes is then the
    difference that the pictures make, not that of two draws. sigma ~ U(0, 1), as in the report.
    """

    beta: float

    def prepare(self, batch: list[Pair], rng: Randomness, frozen: Frozen, align: int) -> ModelInputs:
        samples = [p.win for p in batch] + [p.lose for p in batch]
        sigma = torch.stack([rng.uniform(p.key, p.epoch, "sigma") for p in batch]).repeat(2)
        noise = [rng.normal(p.key, p.epoch, "noise", tuple(p.win.latent.shape)) for p in batch] * 2
        inputs = pack_inputs(
            targets=[interpolate(s.latent, e, t) for s, e, t in zip(samples, noise, sigma, strict=True)],
            texts=[s.txt for s in samples],
            sigma=sigma,
            references=[s.references for s in samples],
            align=align,
        )
        target = torch.cat([patchify(velocity(s.latent, e)) for s, e in zip(samples, noise, strict=True)])
        reference = frozen("reference", inputs)
        errors = per_sample_mean((reference.float() - target.to(reference.device)) ** 2, inputs)
        return replace(inputs, target=target, weight=errors)

    def loss(self, output: Tensor, batch: list[Pair], inputs: ModelInputs) -> tuple[Tensor, float, Metrics]:
        errors = per_sample_mean((output.float() - inputs.target) ** 2, inputs).unflatten(0, (2, -1))
        reference = inputs.weight.unflatten(0, (2, -1))
        losses, margin = dpo_loss(errors, reference, self.beta)
        gained = reference - errors.detach()
        metrics = {
            "loss": losses.detach().sum(),
            "accuracy": ((margin > 0).float() + 0.5 * (margin == 0).float()).sum(),  # undecided counts half
            "margin": margin.detach().sum(),
            "win_gain": gained[0].sum(),
            "lose_gain": gained[1].sum(),
        }
        return losses.sum(), float(len(batch)), metrics


def clipped_ratio_loss(log_ratio: Tensor, advantage: Tensor, clip: Tensor | float) -> Tensor:
    """PPO's pessimistic surrogate: max(-A r, -A clamp(r, 1 - clip, 1 + clip)), r = exp(log_ratio), elementwise."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


@dataclass(frozen=True)
class FlowGRPO:
    """Flow-GRPO (arXiv 2505.05470) over batches of one `Transition`: clipped ratio + beta KL(policy || reference).

    `ratio` is that of the likelihoods, as in Flow-GRPO, or GRPO-Guard's (see `Transition`), whose gradient weighs steps
    alike. With D elements a picture, log-probabilities are *means* over D, so the ratio is p^(1/D), whose spread for a
    given change of the policy falls as 1/sqrt(D). Hence `clip` is given for D = 1 and divided by sqrt(D): .0256 is
    Flow-GRPO's 1e-4 at 512 px (D = 65,536). The KL is that of the two Gaussian steps, (mean - mean_ref)^2 / (2 std^2),
    *averaged* over D; in velocity form |dt|/2 (s (1 - sigma) / (2 sigma) + 1/s)^2 (v - v_ref)^2. Flow-GRPO's code has
    another factor |dt| in it, so its beta .04 at 10 steps is about .004 here.
    """

    clip: float
    beta: float
    ratio: Literal["likelihood", "guard"] = "guard"

    def log_ratio(self, step: Transition, mean: Tensor, std: Tensor) -> Tensor:
        """Logarithm of the ratio [S] of the chosen kind."""
        return step.log_ratio(mean, std) if self.ratio == "likelihood" else step.guarded_log_ratio(mean, std)

    def clip_range(self, step: Transition) -> Tensor:
        """The clip range [S] of each picture's ratio."""
        elements = torch.tensor(step.guidance.lengths, device=step.x.device) * step.x.shape[1]
        return self.clip / elements.sqrt()

    def prepare(self, batch: list[Transition], rng: Randomness, frozen: Frozen, align: int) -> ModelInputs:
        (step,) = batch
        inputs = step.inputs()
        return replace(inputs, target=frozen("reference", inputs)) if self.beta else inputs

    def loss(self, output: Tensor, batch: list[Transition], inputs: ModelInputs) -> tuple[Tensor, float, Metrics]:
        (step,) = batch
        mean, std = step.moments(output)
        log_ratio, clip = self.log_ratio(step, mean, std), self.clip_range(step)
        losses = clipped_ratio_loss(log_ratio, step.advantage, clip)
        moved = (log_ratio.detach().exp() - 1).abs() / clip
        metrics = {"ratio_deviation": moved.sum(), "clipped": (moved > 1).float().sum()}
        if self.beta:
            reference_mean, _ = step.moments(inputs.target)
            kl = step.per_picture((mean - reference_mean) ** 2 / (2 * std**2))
            losses = losses + self.beta * kl
            metrics["kl"] = kl.detach().sum()
        metrics |= {name: score.sum() for name, score in step.scores.items()}
        return losses.sum(), float(len(losses)), {"loss": losses.detach().sum(), **metrics}
