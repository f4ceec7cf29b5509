import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from model.config import MMDiTConfig
from model.mmdit import MMDiT
from model.packing import patchify
from model.sampling.draw import Request, Sampler
from model.sampling.guidance import Condition
from model.sampling.schedule import FixedSchedule, noise_levels
from model.sampling.step import CPS, SDE, Window
from posttrain.flow_grpo import Config, Credited, FlowGRPO, clipped_ratio_loss, guarded_log_ratio, random_steps
from training.randomness import Randomness

CONFIG = MMDiTConfig(2, 2, 16, joint_attention_dim=8, in_channels=16, out_channels=4, axes_dims_rope=(4, 6, 6))
STEPS = 5


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(seed=0):
    net = MMDiT(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return net


KINDS = {"flow-grpo": SDE, "cps": CPS}


def noise(sizes=((1, 2, 3), (1, 2, 2))):
    return [randn(4, f, 2 * h, 2 * w, seed=20 + i) for i, (f, h, w) in enumerate(sizes)]


def draw(picture, step, shape):
    return Randomness(0).normal(f"p{picture}", 0, "sde", shape, draw=step)


def requests(start):
    return [
        Request(Condition(randn(3 + i, 8, seed=i), randn(2, 8, seed=9)), n, partial(draw, i))
        for i, n in enumerate(start)
    ]


def roll(net, kind="flow-grpo", cfg_scale=3.0, level=0.7, random=range(STEPS - 1), start=None):
    """(latents, transitions)"""
    sampler = Sampler(FixedSchedule(STEPS), Window(KINDS[kind](level), random), cfg_scale)
    drawn = sampler.draw(net, requests(start or noise()))
    return drawn.latents, drawn.transitions


def algorithm(clip=1.0, beta=0.0, ratio="likelihood"):
    """The algorithm apart from where its pictures come from."""
    grpo = object.__new__(FlowGRPO)
    grpo.config = Config(clip_range=clip, beta=beta, ratio=ratio)
    return grpo


def grpo(net, reference, transition, advantage=None, **settings):
    advantage = torch.zeros(len(transition.log_prob)) if advantage is None else advantage
    one = algorithm(**settings)
    inputs, aux = one.prepare([Credited(transition, advantage)], Randomness(0), 16)
    frozen = {} if reference is None else {"reference": torch.no_grad()(reference.__call__)}
    return one.loss(net, frozen, inputs, aux)


def test_without_random_steps_it_is_the_sampler():
    net = model()
    latents, transitions = roll(net, random=range(0))
    assert transitions == []
    plain = Sampler(FixedSchedule(STEPS), cfg_scale=3.0).draw(net, requests(noise())).latents
    for a, b in zip(latents, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["flow-grpo", "cps"])
def test_log_prob_is_that_of_torch_distributions(kind):
    """The drawn noise itself gives an independent value of every step's density."""
    net = model()
    _, transitions = roll(net, kind)
    assert len(transitions) == STEPS - 1
    for k, t in enumerate(transitions):
        with torch.no_grad():
            mean, std = t.moments(net(t.inputs()))
        for i, (piece, s) in enumerate(zip(t.guidance.split(t.x_next), t.guidance.split(std), strict=True)):
            eps = draw(i, k, tuple(piece.shape))
            wanted = (Normal(0.0, 1.0).log_prob(eps) - s.log()).mean()
            torch.testing.assert_close(t.log_prob[i], wanted, rtol=1e-4, atol=1e-4)
            m = t.guidance.split(mean)[i]
            torch.testing.assert_close(t.log_prob[i], Normal(m, s.expand_as(m)).log_prob(piece).mean())


def test_steps_follow_the_papers_sde():
    """Mean and std of Flow-GRPO's Eq. 9 written out for one picture, sigma = 1 taken as the second level."""
    net = model()
    x = patchify(noise()[0])
    sigmas = noise_levels(STEPS, 6).double()
    _, transitions = roll(net, cfg_scale=1.0, start=noise()[:1])
    for k, t in enumerate(transitions):
        torch.testing.assert_close(t.x, x)
        with torch.no_grad():
            v = net(t.inputs()).double()
        s, dt = sigmas[k], sigmas[k + 1] - sigmas[k]
        rate = 0.7 * math.sqrt(s / (1 - (sigmas[1] if s == 1 else s)))
        drift = v + rate**2 / (2 * s) * (x.double() + (1 - s) * v)
        x = (x.double() + drift * dt + rate * math.sqrt(-dt) * draw(0, k, tuple(x.shape)).double()).float()
        torch.testing.assert_close(t.x_next, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["flow-grpo", "cps"])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_on_policy_ratio_is_exactly_one(kind, cfg_scale):
    net = model()
    for t in roll(net, kind, cfg_scale)[1]:
        with torch.enable_grad():
            mean, std = t.moments(net(t.inputs()))
        assert torch.equal(t.mean_log_prob(mean, std), t.log_prob)
        for ratio in ("likelihood", "guard"):
            _, _, metrics = grpo(net, None, t, ratio=ratio)
            assert metrics["ratio_deviation"].item() == 0.0 and metrics["clipped"].item() == 0.0


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_pictures_that_begin_alike_are_one_to_the_model_until_they_part(cfg_scale):
    """Two groups of three, of which each has one start: the same pictures, steps and gradients as with copies of it."""
    net, asked = model(), []
    conditions = [Condition(randn(3 + i, 8, seed=i), randn(2, 8, seed=9)) for i in range(2)]
    one = [Request(conditions[i // 3], noise()[i // 3], partial(draw, i)) for i in range(6)]
    alike = [replace(r, noise=one[3 * (i // 3)].noise) for i, r in enumerate(one)]
    sampler = Sampler(FixedSchedule(STEPS), Window(SDE(0.7), range(1, 3)), cfg_scale)

    def velocity(inputs):
        asked.append(inputs.pack.n_samples)
        return net(inputs)

    copies, shared = (sampler.draw(velocity, r) for r in (one, alike))
    sides = 2 if cfg_scale > 1 else 1
    assert asked == [6 * sides] * STEPS + [2 * sides] * 2 + [6 * sides] * (STEPS - 2)
    for a, b in zip(copies.latents, shared.latents, strict=True):
        torch.testing.assert_close(a, b)
    assert [t.inputs().pack.n_samples for t in shared.transitions] == [2 * sides, 6 * sides]
    advantage, gradients = randn(6), []
    for drawn in (copies, shared):
        net.zero_grad()
        for t in drawn.transitions:
            loss, weight, metrics = grpo(net, model(1), t, advantage, beta=0.1)
            assert weight == 6 and metrics["ratio_deviation"].item() == 0.0
            loss.backward()
        gradients.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    for n, g in gradients[0].items():
        torch.testing.assert_close(gradients[1][n], g, rtol=1e-4, atol=1e-4 * g.abs().max().item())


def test_on_policy_gradient_is_that_of_reinforce():
    """At ratio 1 the gradient of the loss is -A grad log p, here with torch.distributions' log-density."""
    net = model()
    t, advantage = roll(net)[1][1], torch.tensor([1.5, -0.5])
    loss, weight, _ = grpo(net, None, t, advantage)
    loss.backward()
    got = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    mean, std = t.moments(net(t.inputs()))
    density = Normal(mean, std.expand_as(mean)).log_prob(t.x_next)
    (-sum(a * d.mean() for a, d in zip(advantage, t.guidance.split(density), strict=True))).backward()
    assert weight == 2.0 and got
    for name, p in net.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-4 * p.grad.abs().max().item() + 1e-8)


def test_guarded_ratio_weighs_all_steps_alike():
    """Equal to the paper's formula, and -(1 + a^2/2) noise (v - v_old) whatever the step."""
    net, other = model(0), model(1)
    for k, t in enumerate(roll(net, cfg_scale=1.0)[1]):
        with torch.no_grad():
            v, v_old = other(t.inputs()), net(t.inputs())
        mean, std = t.moments(v)
        got, dt = guarded_log_ratio(t, mean, std), t.sigma - t.sigma_next
        bias = t.per_picture((mean - t.mean) ** 2 / (2 * std**2))
        scale = torch.stack([s[0, 0] for s in t.guidance.split(std)]) / dt
        torch.testing.assert_close(got, (t.mean_log_prob(mean, std) - t.log_prob + bias) * scale, rtol=1e-3, atol=1e-4)
        if k:  # at sigma = 1 the formula's factor is 1
            noise = torch.cat([draw(i, k, tuple(x.shape)) for i, x in enumerate(t.guidance.split(mean))])
            wanted = -(1 + 0.7**2 / 2) * t.per_picture(noise * (v - v_old))
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_gradient_flows_through_both_branches_of_guidance():
    net = model()
    t = roll(net)[1][0]
    inputs = replace(t.inputs(), txt=t.inputs().txt.clone().requires_grad_())
    loss, _, _ = algorithm().loss(net, {}, inputs, Credited(t, torch.ones(2)))
    (grad,) = torch.autograd.grad(loss, inputs.txt)
    positive, negative = grad[:7], grad[7:11]
    assert positive.abs().max() > 0 and negative.abs().max() > 0


@pytest.mark.parametrize("kind", ["flow-grpo", "cps"])
def test_kl_is_that_of_the_two_steps(kind):
    policy, reference = model(0), model(1)
    for t in roll(policy, kind)[1]:
        loss, weight, metrics = grpo(policy, reference, t, beta=0.3)
        with torch.no_grad():
            (m, s), (m_ref, s_ref) = (t.moments(net(t.inputs())) for net in (policy, reference))
        wanted = kl_divergence(Normal(m, s.expand_as(m)), Normal(m_ref, s_ref.expand_as(m)))
        wanted = sum(piece.mean() for piece in t.guidance.split(wanted))
        torch.testing.assert_close(metrics["kl"], wanted)
        torch.testing.assert_close(loss.detach(), 0.3 * wanted)  # advantages are 0


def test_kl_equals_its_velocity_form():
    """|dt|/2 (s (1 - sigma) / (2 sigma) + 1/s)^2 |v - v_ref|^2 (arXiv 2505.05470, section 4.2)."""
    policy, reference = model(0), model(1)
    for t in roll(policy, cfg_scale=1.0)[1]:
        _, _, metrics = grpo(policy, reference, t, beta=1.0)
        with torch.no_grad():
            dv = t.guidance.split(policy(t.inputs()) - reference(t.inputs()))
        total = 0.0
        for i, d in enumerate(dv):
            sigma, dt = t.sigma[i], t.sigma_next[i] - t.sigma[i]
            s = 0.7 * (sigma / (1 - (t.sigma_next[i] if sigma == 1 else sigma))).sqrt()
            total += -dt / 2 * (s * (1 - sigma) / (2 * sigma) + 1 / s) ** 2 * (d**2).mean()
        torch.testing.assert_close(metrics["kl"], total, rtol=1e-4, atol=1e-6)


def test_clipping_is_ppos():
    log_ratio = torch.tensor([0.3, -0.3, 0.05, 0.3, -0.3]).log1p().requires_grad_()
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    losses = clipped_ratio_loss(log_ratio, advantage, 0.1)
    torch.testing.assert_close(losses, torch.tensor([-1.1, -0.7, -1.05, 1.3, 0.9]))
    (grad,) = torch.autograd.grad(losses.sum(), log_ratio)
    torch.testing.assert_close(grad, torch.tensor([0.0, -0.7, -1.05, 1.3, 0.0]))


def test_ratio_moves_with_the_policy_by_the_stated_unit():
    """For a small change of the policy the log ratio's spread is sqrt(2 KL / D): why clip scales with 1/sqrt(D)."""
    net = model()
    _, transitions = roll(net, cfg_scale=1.0, random=range(1, 2), start=noise(((1, 16, 16),) * 8))
    (t,) = transitions
    other = model()
    with torch.no_grad():
        other.output.proj.bias += 0.01
        mean, std = t.moments(other(t.inputs()))
        old, _ = t.moments(net(t.inputs()))
        log_ratio = t.mean_log_prob(mean, std) - t.log_prob
        kl = t.per_picture((mean - old) ** 2 / (2 * std**2))
    elements = 16 * 16 * CONFIG.in_channels
    z = (log_ratio + kl) / (2 * kl / elements).sqrt()
    assert z.abs().max() < 4 and 0.3 < z.std() < 2


def test_window_lies_in_the_first_half_and_the_last_step_is_never_random():
    assert random_steps(10, 0, 0.5) == range(9)
    places = {random_steps(10, 2, u / 100) for u in range(100)}
    assert places == {range(i, i + 2) for i in range(4)}
    assert random_steps(3, 2, 0.99) == range(2)
    for window in (-1, 10, 11):
        with pytest.raises(ValueError, match="random steps"):
            random_steps(10, window, 0.0)


def test_a_picture_depends_on_its_own_draws_alone():
    net = model()
    whole, _ = roll(net)
    alone, _ = roll(net, start=noise()[:1])
    torch.testing.assert_close(alone[0], whole[0], rtol=1e-4, atol=1e-5)


def test_the_noise_floor_of_every_step_counts():
    """A model that repeats itself at the first step and not at the last is refused."""
    net = model()
    _, transitions = roll(net, cfg_scale=1.0)
    last = transitions[-1].sigma.max()
    wrong = lambda inputs: net(inputs) * (1.01 if inputs.sigma.max() <= last else 1.0)  # noqa: E731
    one = algorithm(clip=1e-3)
    engine = SimpleNamespace(model=wrong, any_rank=lambda flag: flag)
    one.studio = SimpleNamespace(engine=engine)
    with pytest.raises(ValueError, match="raise --clip-range"):
        one._check_noise_floor(transitions)
    engine.model = net
    one._check_noise_floor(transitions)
