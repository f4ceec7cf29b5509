"""One time convention; the schedule is the scheduler's; densities are what they say."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from scipy import stats

from model import flow
from model.sampling.schedule import FixedSchedule, noise_levels
from model.tiny_components import SCHEDULER


def scheduler_sigmas(steps: int, tokens: int) -> torch.Tensor:
    config = {k: v for k, v in SCHEDULER.items() if not k.startswith("_")}
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    mu = calculate_shift(tokens, 256, 8192, 0.5, 0.9)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    return scheduler.sigmas


@pytest.mark.parametrize("tokens", [16, 256, 1600, 4096, 83 * 83])
@pytest.mark.parametrize("steps", [2, 7, 50])
def test_schedule_equals_the_scheduler(tokens, steps):
    ours = noise_levels(steps, tokens)
    torch.testing.assert_close(ours, scheduler_sigmas(steps, tokens), rtol=0, atol=2e-6)
    assert ours[0] == 1 and ours[-1] == 0 and ours[-2] == pytest.approx(0.02)


@pytest.mark.parametrize("side, mu", [(256, 0.5), (1024, 0.694), (1328, 0.834)])
def test_shift_grows_with_resolution(side, mu):
    assert flow.resolution_mu((side // 16) ** 2) == pytest.approx(mu, abs=1e-3)


def test_one_step_is_refused():
    with pytest.raises(ValueError, match="at least 2 steps"):
        FixedSchedule(1)


def test_velocity_carries_data_to_noise():
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64)
    v = flow.velocity(x0, eps)
    torch.testing.assert_close(flow.interpolate(x0, eps, 0.3) + 0.4 * v, flow.interpolate(x0, eps, 0.7))
    torch.testing.assert_close(flow.predict_x0(flow.interpolate(x0, eps, 0.7), v, 0.7), x0)


def test_densities():
    n = 20_000
    z, u = torch.randn(n, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, n + 2)[1:-1]
    logit = torch.logit(flow.logit_normal(z, mean=0.5, std=2.0).double()).numpy()
    assert stats.kstest(logit, stats.norm(0.5, 2.0).cdf).pvalue > 1e-3
    mode = flow.mode_density(u)
    assert mode.min() >= 0 and mode.max() <= 1 and (mode.diff() < 0).all()
    shifted = flow.shift_sigma(u, mu=math.log(3.0))  # Eq. 23 of SD3 with sqrt(m/n) = 3
    torch.testing.assert_close(shifted, 3 * u / (1 + 2 * u))
