"""Draw: the only way to a picture. Requests are packed under one token budget and walked from noise to data.

    x at sigma = 1  ->  v = guidance(model(x, sigma))  ->  sigma' = schedule(...)  ->  x' = step(x, v, sigma, sigma')

Random steps leave `Transition`s: a chain of Gaussians whose probability under any policy is known, which makes a
sampler of the flow into a policy (Flow-GRPO, arXiv 2505.05470). Latents and log-probabilities stay in fp32, and a
transition remembers the very pack in which it was drawn: on an unchanged policy the ratio of probabilities is then one,
up to what the kernels themselves cannot repeat.

Shape legend: S pictures of one pack, L target tokens of all of them, C channels of a token.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model.moving import moved
from model.packing import ModelInputs, patchify, token_size, unpatchify
from model.sampling.guidance import Condition, Guidance
from model.sampling.schedule import FixedSchedule, Schedule, View
from model.sampling.step import ODE, Step, log_prob

Velocity = Callable[[ModelInputs], Tensor]
"""An MMDiT, or anything that maps packed inputs to velocities [n_target, C]."""


@dataclass(frozen=True)
class Request:
    """What one picture is drawn from. Requests that hold the same tensors are one to the model until a random step."""

    condition: Condition
    noise: Tensor
    """Standard normal [C, F, H, W], fp32: the picture at sigma = 1."""
    eps: Callable[[int, tuple[int, ...]], Tensor] | None = None
    """eps(k, shape): the standard normal of the k-th step; needed where steps are random."""

    def to(self, device: torch.device | str) -> "Request":
        return moved(self, device)


@dataclass(frozen=True)
class Transition:
    """One random step of the pictures of a pack."""

    pictures: tuple[int, ...]
    """The requests that they are of, S numbers."""
    guidance: Guidance
    step: Step
    x: Tensor
    """fp32 [L, C] before the step."""
    x_next: Tensor
    """fp32 [L, C] after it."""
    sigma: Tensor
    """[S] noise level before the step, on the CPU."""
    sigma_next: Tensor
    mean: Tensor
    """fp32 [L, C] mean of the step of the policy that drew it."""
    log_prob: Tensor
    """fp32 [S] under that policy, averaged over a picture's tokens and channels."""

    def inputs(self) -> ModelInputs:
        """What the model is asked."""
        return self.guidance.inputs(self.x, self.sigma)

    def moments(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [L, C] and standard deviation [L, 1] of the step of a policy whose model answered `output`."""
        sigma, sigma_next = (self.guidance.per_token(moved(s, self.x.device)) for s in (self.sigma, self.sigma_next))
        return self.step.moments(self.x, self.guidance.combine(output.float()), sigma, sigma_next)

    def mean_log_prob(self, mean: Tensor, std: Tensor) -> Tensor:
        """Log density of the step, *averaged* over a picture's tokens and channels: [S]."""
        return self.per_picture(log_prob(self.x_next, mean, std))

    def per_picture(self, values: Tensor) -> Tensor:
        """Mean over tokens and channels: [L, C] -> [S]."""
        return torch.stack([piece.mean() for piece in self.guidance.split(values)])


@dataclass(frozen=True)
class Drawn:
    """What came of requests."""

    latents: list[Tensor]
    """fp32 [C, F, H, W], one a request."""
    transitions: list[Transition] = field(default_factory=list)
    """The random steps, pack after pack."""


@dataclass(frozen=True)
class Sampler:
    """How pictures are drawn, whatever of."""

    schedule: Schedule = field(default_factory=FixedSchedule)
    step: Step = field(default_factory=ODE)
    cfg_scale: float = 4.0
    """1 draws without guidance."""
    tokens_per_pack: int = 16384
    """Pictures run together up to so many tokens: text, target and references, twice of each under guidance."""
    align: int = 16
    """Multiple that both streams of a pack are rounded up to."""

    @torch.no_grad()
    def draw(self, velocity: Velocity, requests: Sequence[Request]) -> Drawn:
        """The pictures of `requests`, on the device of their conditions.

        Raises ValueError for input, or a model's output, that is not finite.
        """
        latents: list[Tensor | None] = [None] * len(requests)
        transitions: list[Transition] = []
        for pack in self.packs(requests):
            for number in pack:
                self._check(number, requests[number])
            for number, latent in self._draw_pack(velocity, requests, pack, transitions):
                latents[number] = latent
        return Drawn(latents, transitions)

    def cost(self, request: Request) -> int:
        """Tokens that a picture takes in a pack."""
        condition, sides = request.condition, 2 if self.cfg_scale > 1 else 1
        latents = math.prod(token_size(request.noise)) + sum(math.prod(token_size(r)) for r in condition.references)
        texts = [condition.txt] if sides == 1 or condition.txt_empty is None else [condition.txt, condition.txt_empty]
        return sides * latents + sum(map(len, texts))

    def packs(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Numbers of consecutive requests that fit into one pack."""
        pack, used = [], 0
        for number, request in enumerate(requests):
            cost = self.cost(request)
            if pack and used + cost > self.tokens_per_pack:
                yield pack
                pack, used = [], 0
            pack.append(number)
            used += cost
        if pack:
            yield pack

    def _check(self, number: int, request: Request) -> None:
        condition = request.condition
        given = [request.noise, condition.txt, *condition.references]
        if self.cfg_scale > 1 and condition.txt_empty is not None:
            given.append(condition.txt_empty)
        if not all(tensor.isfinite().all() for tensor in given):
            raise ValueError(f"picture {number}: its noise, prompt or references hold NaN or infinite values")

    def _draw_pack(
        self, velocity: Velocity, requests: Sequence[Request], pack: list[int], transitions: list[Transition]
    ) -> Iterator[tuple[int, Tensor]]:
        """(number, latent) of each picture as it is finished; appends to `transitions`."""
        sizes = [token_size(requests[n].noise) for n in pack]
        walk = self.schedule.begin(sizes)
        going = tuple(range(len(pack)))
        shared = _first_like(requests[n] for n in pack) if isinstance(self.schedule, FixedSchedule) else None
        guidance = self._layout(requests, pack, shared)
        x = torch.cat([patchify(requests[n].noise.float()) for n in pack]).to(guidance.pack.img_pos.device)
        sigma, k = torch.ones(len(pack)), 0
        while going:
            inputs = guidance.inputs(x, sigma)
            v = guidance.combine(velocity(inputs).float())
            sigma_next = walk(View(k, going, sigma, x, v, guidance))
            step = self.step.at(k)
            before, after = (guidance.per_token(moved(s, x.device)) for s in (sigma, sigma_next))
            mean, std = step.moments(x, v, before, after)
            x_next = mean
            if step.random and sigma_next.any():  # the last step is never random
                numbers = tuple(pack[i] for i in going)
                parts = zip(numbers, guidance.split(mean), strict=True)
                eps = torch.cat([requests[n].eps(k, tuple(part.shape)) for n, part in parts])
                x_next = mean + std * moved(eps, mean.device)
                made = Transition(numbers, guidance, step, x, x_next, sigma, sigma_next, mean, sigma)
                transitions.append(replace(made, log_prob=made.mean_log_prob(mean, std)))
                if shared is not None:
                    shared, guidance = None, self._layout(requests, pack)
            x, sigma, k = x_next, sigma_next, k + 1
            if not (finished := sigma == 0).any():
                continue
            tokens = guidance.split(x)
            for i, done, piece in zip(going, finished.tolist(), tokens, strict=True):
                if done:
                    yield pack[i], _finite(unpatchify(piece, sizes[i]))
            left = [j for j, done in enumerate(finished.tolist()) if not done]
            going = tuple(going[j] for j in left)
            if going:
                guidance = self._layout(requests, [pack[i] for i in going])
                x, sigma = torch.cat([tokens[j] for j in left]), sigma[left]

    def _layout(
        self, requests: Sequence[Request], numbers: list[int], first_like: Sequence[int] | None = None
    ) -> Guidance:
        chosen = [requests[n] for n in numbers]
        sizes = [token_size(r.noise) for r in chosen]
        return Guidance([r.condition for r in chosen], sizes, self.cfg_scale, self.align, first_like)


def _first_like(requests: Iterable[Request]) -> list[int] | None:
    """Which is the first request that holds each one's condition and noise; None if all differ."""
    first: dict[tuple[int, int], int] = {}
    found = [first.setdefault((id(r.condition), id(r.noise)), number) for number, r in enumerate(requests)]
    return found if len(first) < len(found) else None


def _finite(latent: Tensor) -> Tensor:
    if not latent.isfinite().all():
        raise ValueError("the model's velocities are NaN or infinite although its inputs are not: its weights are bad")
    return latent
