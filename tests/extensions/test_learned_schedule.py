"""A schedule that learns: a small module looks at what the model computes and says how far each picture may go next.

    sigma' = r sigma,  r ~ Beta(a, b),  (a, b) = head(features of the picture in the last block, sigma)

After TPDM (arXiv 2412.01243). The pictures of a pack end at different steps. The model is read by a forward hook and
knows nothing of it; the choices and their features are kept, so that the policy gradient needs no second look at the
model.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from scipy.special import betaincinv
from tiny_models import CONFIG, EDIT_2511, random_model, relative
from torch import Tensor, nn
from torch.distributions import Beta

from model.mmdit import MMDiT
from model.packing import Size
from model.sampling.draw import Request, Sampler
from model.sampling.guidance import Condition
from model.sampling.schedule import View
from model.sampling.step import ODE, SDE

END = 0.1
"""Noise level from which the next step is the last."""
LONGEST = 12
"""Steps after which a picture is ended."""


class Pace(nn.Module):
    """Features of a picture [S, D] at noise level sigma [S] -> the distribution of the share of it that it keeps."""

    def __init__(self, width: int):
        super().__init__()
        self.head = nn.Linear(width + 1, 2)
        nn.init.zeros_(self.head.weight)

    def forward(self, features: Tensor, sigma: Tensor) -> Beta:
        mean, weight = self.head(torch.cat([features, sigma[:, None]], dim=1)).unbind(1)
        mean, weight = mean.sigmoid(), 2 + weight.exp()
        return Beta(mean * weight, (1 - mean) * weight)


@dataclass(frozen=True)
class Choice:
    """What was chosen for one picture, and on what grounds."""

    features: Tensor
    sigma: Tensor
    r: Tensor


@dataclass
class LearnedSchedule:
    """A `Schedule`. Each picture draws its r from a generator of its own, whatever pack it is in."""

    pace: Pace
    model: MMDiT
    seeds: list[int]
    """One for each request of a draw."""
    choices: list[list[Choice]] = field(default_factory=list)
    """Of each request, in the order of its steps."""

    def __post_init__(self):
        self.model.blocks[-1].register_forward_hook(self._see)

    def _see(self, block: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        self._img = output[0]  # [tokens of the image stream, D]: the pictures' own come first

    def begin(self, sizes: list[Size]):
        first = len(self.choices)  # packs are begun in the order of their requests
        self.choices += [[] for _ in sizes]
        generators = [np.random.default_rng(seed) for seed in self.seeds[first : first + len(sizes)]]

        def walk(view: View) -> Tensor:
            pieces = view.guidance.split(self._img[: len(view.x)])
            features = torch.stack([piece.float().mean(0) for piece in pieces]).cpu()
            chances = self.pace(features, view.sigma)
            pairs = zip(view.pictures, chances.concentration1.tolist(), chances.concentration0.tolist(), strict=True)
            # the inverse of the distribution function moves with a and b; numpy's rejection sampling may jump
            r = torch.tensor([betaincinv(a, b, generators[i].random()) for i, a, b in pairs]).float().clamp(0.01, 0.99)
            for i, *choice in zip(view.pictures, features, view.sigma, r, strict=True):
                self.choices[first + i].append(Choice(*choice))
            after = r * view.sigma
            return torch.where(after < END, 0.0, after) if view.step < LONGEST - 1 else torch.zeros_like(after)

        return walk

    def log_prob(self, choices: list[Choice]) -> Tensor:
        """Of all choices of a picture, with gradient to `pace`."""
        features, sigma, r = (torch.stack([getattr(c, n) for c in choices]) for n in ("features", "sigma", "r"))
        return self.pace(features, sigma).log_prob(r).sum()


@dataclass
class Again:
    """The schedule of one picture whose choices are known."""

    choices: list[Choice]

    def begin(self, sizes: list[Size]):
        levels = [c.sigma for c in self.choices[1:]] + [torch.tensor(0.0)]
        return lambda view: levels[view.step][None]


SIZES = [(4, 6), (8, 8), (4, 6), (2, 2), (6, 4)]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def requests(config=CONFIG) -> list[Request]:
    """Five sizes, prompts of different lengths, and 0 to 2 pictures to edit."""
    made = []
    for i, (h, w) in enumerate(SIZES):
        references = tuple(normal(16, 1, 4, 2 * r + 2, seed=90 + i + r) for r in range(i % 3))
        txt, empty = (normal(n, config.joint_attention_dim, seed=s) for n, s in ((3 + 4 * i, i), (4, 50 + i)))
        eps = lambda k, shape, i=i: normal(*shape, seed=1000 * i + k)  # noqa: E731
        made.append(Request(Condition(txt, empty, references), normal(16, 1, h, w, seed=i), eps))
    return made


def learned(config=CONFIG, sharpness=0.3) -> LearnedSchedule:
    torch.manual_seed(0)
    pace, model = Pace(config.width), random_model(config)
    nn.init.normal_(pace.head.weight, std=sharpness)
    return LearnedSchedule(pace, model, list(range(len(SIZES))))


@pytest.mark.parametrize("step", [ODE(), SDE(0.7)], ids=["ode", "sde"])
@pytest.mark.parametrize("config", [CONFIG, EDIT_2511], ids=["plain", "zero_cond_t"])
@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_pictures_that_end_at_different_steps_equal_those_drawn_alone(config, cfg_scale, step):
    schedule = learned(config)
    drawn = Sampler(schedule, step, cfg_scale).draw(schedule.model, requests(config))
    lengths = [len(choices) for choices in schedule.choices]
    assert len(set(lengths)) >= 3 and max(lengths) <= LONGEST, lengths
    for request, latent, choices in zip(requests(config), drawn.latents, schedule.choices, strict=True):
        alone = Sampler(Again(choices), step, cfg_scale, align=1).draw(schedule.model, [request]).latents[0]
        assert latent.shape == request.noise.shape and relative(latent, alone) < 1e-5
    if isinstance(step, SDE):  # every step of a picture but its last is a transition of it, and no other
        seen = [number for t in drawn.transitions for number, p in zip(t.pictures, t.log_prob, strict=True) if p != 0]
        assert [seen.count(i) for i in range(len(SIZES))] == [n - 1 for n in lengths]


def test_a_picture_chooses_alike_in_any_pack():
    together, apart = learned(sharpness=0.1), learned(sharpness=0.1)  # .3 makes 1e-3 of a rounding error in five steps
    drawn = Sampler(together).draw(together.model, requests()).latents
    packs = Sampler(apart, tokens_per_pack=60)
    assert len(list(packs.packs(requests()))) > 2
    for a, b in zip(packs.draw(apart.model, requests()).latents, drawn, strict=True):
        assert relative(a, b) < 1e-4
    for a, b in zip(together.choices, apart.choices, strict=True):
        torch.testing.assert_close([c.r for c in a], [c.r for c in b], rtol=1e-4, atol=1e-5)


def test_the_policy_gradient_is_that_of_the_density():
    schedule = learned()
    Sampler(schedule).draw(schedule.model, requests())
    credit = torch.tensor([1.0, -0.5, 0.3, 0.0, -0.8])
    objective = sum(a * schedule.log_prob(c) for a, c in zip(credit, schedule.choices, strict=True))
    objective.backward()
    weight, bias = (p.detach().double().requires_grad_() for p in (schedule.pace.head.weight, schedule.pace.head.bias))
    expected = 0.0
    for a, choices in zip(credit, schedule.choices, strict=True):
        for c in choices:
            mean, size = weight @ torch.cat([c.features, c.sigma[None]]).double() + bias
            mean, size, r = mean.sigmoid(), 2 + size.exp(), c.r.double()
            p, q = mean * size, (1 - mean) * size
            density = (p - 1) * r.log() + (q - 1) * (1 - r).log() + size.lgamma() - p.lgamma() - q.lgamma()
            expected = expected + a.double() * density
    torch.testing.assert_close(objective.double(), expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(
        schedule.pace.head.parameters(), torch.autograd.grad(expected, [weight, bias]), strict=True
    ):
        assert relative(ours.grad.double(), theirs) < 1e-4 and ours.grad.abs().max() > 1e-3
    assert all(p.grad is None for p in schedule.model.parameters())


def test_it_learns_to_take_fewer_steps():
    """REINFORCE with a leave-one-out baseline; the reward is the number of steps, negated."""
    schedule = LearnedSchedule(pace := Pace(CONFIG.width), random_model(CONFIG), [])
    optimizer = torch.optim.Adam(pace.parameters(), lr=0.1)
    request, sampler, steps = requests()[3], Sampler(schedule, cfg_scale=1.0), []
    for update in range(15):
        schedule.choices.clear()
        schedule.seeds = list(range(8 * update, 8 * update + 8))
        sampler.draw(schedule.model, [request] * 8)
        reward = -torch.tensor([float(len(c)) for c in schedule.choices])
        credit = (reward - reward.mean()) * 8 / 7
        loss = -sum(a * schedule.log_prob(c) for a, c in zip(credit, schedule.choices, strict=True)) / 8
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps.append(-reward.mean().item())
    assert np.mean(steps[-3:]) < 0.8 * np.mean(steps[:3]), steps
