"""Sampling: guidance, ODE and SDE steps, and batches that leave their pictures alone."""

import math

import pytest
import torch
from tiny_models import CONFIG, EDIT_2511, random_model, relative

from model.packing import patchify
from model.sampling.draw import Request, Sampler
from model.sampling.guidance import Condition, Guidance
from model.sampling.schedule import FixedSchedule, noise_levels
from model.sampling.step import CPS, SDE, log_prob

SIZES = [(4, 6), (8, 8), (4, 6), (2, 2)]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(model, conditions, noise, steps, cfg_scale=4.0, align=16):
    requests = [Request(c, n) for c, n in zip(conditions, noise, strict=True)]
    return Sampler(FixedSchedule(steps), cfg_scale=cfg_scale, align=align).draw(model, requests).latents


def conditions(config):
    return [
        Condition(draw(3 + 9 * i, config.joint_attention_dim, seed=i), draw(4, config.joint_attention_dim, seed=50 + i),
                  tuple(draw(16, 1, 4, 2 * r + 2, seed=90 + i + r) for r in range(i)))
        for i in range(len(SIZES))
    ]  # fmt: skip


@pytest.mark.parametrize("config", [CONFIG, EDIT_2511], ids=["plain", "zero_cond_t"])
@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_pictures_do_not_depend_on_their_batch(config, cfg_scale):
    model = random_model(config)
    noise = [draw(16, 1, h, w, seed=i) for i, (h, w) in enumerate(SIZES)]
    together = sample(model, conditions(config), noise, steps=4, cfg_scale=cfg_scale)
    for c, n, x in zip(conditions(config), noise, together, strict=True):
        (alone,) = sample(model, [c], [n], steps=4, cfg_scale=cfg_scale, align=1)
        assert relative(x, alone) < 1e-5


def test_guidance_is_the_pipelines():
    model = random_model()
    (c,) = conditions(CONFIG)[:1]
    x, sigma = patchify(draw(16, 1, 4, 6)), torch.tensor([0.7])
    guidance = Guidance([c], [(1, 2, 3)], cfg_scale=3.0)
    v = guidance.combine(model(guidance.inputs(x, sigma)))
    pos, neg = (
        model(Guidance([Condition(t)], [(1, 2, 3)], cfg_scale=1.0).inputs(x, sigma)) for t in (c.txt, c.txt_empty)
    )
    comb = neg + 3.0 * (pos - neg)  # QwenImagePipeline.__call__
    expected = comb * (torch.norm(pos, dim=-1, keepdim=True) / torch.norm(comb, dim=-1, keepdim=True))
    assert relative(v, expected) < 1e-5


def test_guidance_of_a_zero_model_is_zero():
    guidance = Guidance(conditions(CONFIG)[:1], [(1, 2, 3)])
    assert torch.equal(guidance.combine(torch.zeros(12, 64)), torch.zeros(6, 64))


@pytest.mark.parametrize("kind", [SDE, CPS])
def test_no_noise_is_the_ode_exactly(kind):
    x, v = draw(40, 64), draw(40, 64, seed=1)
    levels = noise_levels(10, 300)
    for sigma, sigma_next in zip(levels[:-1], levels[1:], strict=True):
        mean, std = kind(0.0).moments(x, v, sigma, sigma_next)
        assert torch.equal(mean, x + (sigma_next - sigma) * v) and (std == 0).all()


@pytest.mark.parametrize("kind", [SDE, CPS])
def test_last_step_is_the_ode_and_carries_no_probability(kind):
    x, v = draw(40, 64), draw(40, 64, seed=1).requires_grad_()
    sigma, last = torch.tensor(0.02), torch.tensor(0.0)
    mean, std = kind(0.7).moments(x, v, sigma, last)
    torch.testing.assert_close(mean, x - 0.02 * v)
    density = log_prob(mean.detach(), mean, std)
    assert (density == 0).all()
    density.sum().backward()
    assert (v.grad == 0).all()


@pytest.mark.parametrize("sigma, sigma_next", [(1.0, 0.95), (0.8, 0.6), (0.3, 0.02)])
def test_flow_grpo_step_follows_the_official_code(sigma, sigma_next):
    """The lines of sd3_sde_with_logprob (yifan123/flow_grpo), with the density by torch.distributions."""
    x, v, noise, level, sigma_max = draw(40, 64), draw(40, 64, seed=1), draw(40, 64, seed=2), 0.7, 0.95
    sigma, sigma_next = torch.tensor(sigma), torch.tensor(sigma_next)
    dt = sigma_next - sigma
    std_dev_t = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * level
    mean = x * (1 + std_dev_t**2 / (2 * sigma) * dt) + v * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
    std = std_dev_t * torch.sqrt(-1 * dt)
    x_next = mean + std * noise

    ours = SDE(level).moments(x, v, sigma, sigma_next)
    torch.testing.assert_close(ours[0], mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], std)
    expected = torch.distributions.Normal(mean, std).log_prob(x_next)
    torch.testing.assert_close(log_prob(x_next, mean, std.expand_as(mean)), expected)


def test_cps_keeps_the_coefficients():
    """x' = (1 - sigma') x0 + sigma' (cos eps + sin w): the noise in x' has standard deviation sigma', as in the ODE."""
    x0, eps, w = draw(40, 64), draw(40, 64, seed=1), draw(40, 64, seed=2)
    sigma, sigma_next, level = torch.tensor(0.8), torch.tensor(0.6), 0.7
    mean, std = CPS(level).moments((1 - sigma) * x0 + sigma * eps, eps - x0, sigma, sigma_next)
    angle = level * math.pi / 2
    expected = (1 - sigma_next) * x0 + sigma_next * (math.cos(angle) * eps + math.sin(angle) * w)
    torch.testing.assert_close(mean + std * w, expected, rtol=1e-5, atol=1e-5)


def test_cps_refuses_to_turn_the_noise_around():
    CPS(1.0)
    for level in (1.2, -0.1):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            CPS(level)


def test_stochastic_steps_keep_the_marginal():
    """With the true velocity of Gaussian data, the SDE leaves the same distribution as the ODE: std of x_sigma."""
    n, data_std = 200_000, 0.5
    spread = lambda s: ((1 - s) ** 2 * data_std**2 + s**2).sqrt()  # noqa: E731
    levels = torch.linspace(0.9, 0.1, 81)
    x = draw(n) * spread(levels[0])
    for i, (sigma, sigma_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        v = (sigma - (1 - sigma) * data_std**2) / spread(sigma) ** 2 * x  # E[eps - x0 | x]
        mean, std = SDE(0.7).moments(x, v, sigma, sigma_next)
        x = mean + std * draw(n, seed=i + 1)
    assert x.std().item() == pytest.approx(spread(levels[-1]).item(), rel=0.02)


def test_bad_input_is_named():
    (c,) = conditions(CONFIG)[:1]
    with pytest.raises(ValueError, match="negative prompt"):
        sample(random_model(), [Condition(c.txt)], [draw(16, 1, 4, 4)], steps=2)
    with pytest.raises(ValueError, match="1 conditions, but 2 sizes"):
        Guidance([c], [(1, 2, 2)] * 2)
    with pytest.raises(ValueError, match="at least 2 steps"):
        sample(random_model(), [c], [draw(16, 1, 4, 4)], steps=1)
    with pytest.raises(ValueError, match="NaN"):
        sample(random_model(), [c], [torch.full((16, 1, 4, 4), math.nan)], steps=2)
    with pytest.raises(ValueError, match="NaN"):
        sample(random_model(), [Condition(c.txt * math.inf, c.txt_empty)], [draw(16, 1, 4, 4)], steps=2)
    broken = random_model()
    broken.img_in.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="its weights are bad"):
        sample(broken, [c], [draw(16, 1, 4, 4)], steps=2)
