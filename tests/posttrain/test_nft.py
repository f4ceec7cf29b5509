"""DiffusionNFT: its loss against the authors' numbers, what it asks of whom, and the bandit."""

import math
from dataclasses import replace

import pytest
import torch
from test_flow_grpo_learns import GROUP, SIZE_PX, learn
from worlds import run_world

from command_line import UserError
from data_pipeline.sample import EncodedSample
from model.flow import interpolate
from model.packing import patchify
from model.sampling.guidance import Condition
from model.sampling.schedule import noise_levels
from posttrain.nft import Config, DiffusionNFT, Judged, Target
from posttrain.rollout.prompts import Prompt
from posttrain.rollout.rollouts import Group
from training.flow_matching import noised
from training.randomness import Randomness

SHAPE = (4, 16, 1, 8, 8)
SIGMA = torch.tensor([1.0, 0.75, 0.5, 0.0625])
ADVANTAGE = torch.tensor([2.0, -7.0, 0.25, -0.875])


def wave(rate: float) -> torch.Tensor:
    """Numbers of variance 1 that no generator has to repeat, exact in fp32."""
    places = torch.arange(1, 1 + math.prod(SHAPE)).double().view(SHAPE)
    return (math.sqrt(2) * torch.sin(rate * places)).float().double()


def tensors(distance: float) -> dict[str, torch.Tensor]:
    """Latents, noise and velocities [4, 16, 1, 8, 8], exact in fp32; `distance` of the policy from its copy."""
    x0, noise = wave(12.9898), wave(78.233)
    old = noise - x0 + 0.3 * wave(37.719)
    v, reference = old + distance * wave(4.1414), old + wave(9.151) / 8
    found = {"x0": x0, "noise": noise, "old": old, "v": v, "reference": reference}
    return {name: x.float().double() for name, x in found.items()}


def algorithm(**settings) -> DiffusionNFT:
    """The algorithm apart from where its pictures come from."""
    nft = object.__new__(DiffusionNFT)
    nft.config = Config(**settings)
    return nft


def ours(t: dict[str, torch.Tensor], **settings):
    """(mean loss, gradient by v, metrics, who was asked) of `DiffusionNFT.loss`."""
    samples = [EncodedSample(str(i), x.float(), torch.ones(3 + i, 8)) for i, x in enumerate(t["x0"])]
    inputs, velocity = noised(samples, [s.txt for s in samples], list(t["noise"].float()), SIGMA, 16)
    v, asked = t["v"].clone().requires_grad_(), []
    tokens = lambda name, x: asked.append(name) or torch.cat([patchify(piece) for piece in x])  # noqa: E731
    frozen = {name: (lambda inputs, name=name: tokens(name, t[name])) for name in ("old", "reference")}
    loss, weight, metrics = algorithm(**settings).loss(
        lambda inputs: tokens("policy", v), frozen, inputs, Target(velocity, ADVANTAGE)
    )
    loss = loss / weight
    return loss.item(), torch.autograd.grad(loss, v)[0], metrics, asked


def written_out(t: dict[str, torch.Tensor], beta: float, advantage_range: float, kl_weight: float):
    """(mean loss, gradient by v) of the formula in x0, in fp64."""
    v, s = t["v"].clone().requires_grad_(), SIGMA.double().view(4, 1, 1, 1, 1)
    x = interpolate(t["x0"], t["noise"], s)
    mean = lambda values: values.flatten(1).mean(1)  # noqa: E731

    def error(velocity):
        off = x - s * velocity - t["x0"]
        return mean(off**2) / mean(off.detach().abs())

    r = 0.5 + ADVANTAGE.double().clamp(-advantage_range, advantage_range) / advantage_range / 2
    positive, negative = error(beta * v + (1 - beta) * t["old"]), error((1 + beta) * t["old"] - beta * v)
    losses = (r * positive + (1 - r) * negative) * advantage_range / beta + kl_weight * mean((v - t["reference"]) ** 2)
    return losses.mean().item(), torch.autograd.grad(losses.mean(), v)[0]


def products(t: dict[str, torch.Tensor], grad: torch.Tensor) -> list[float]:
    return (grad * (t["v"] + t["x0"] - t["noise"])).flatten(1).sum(1).tolist()


# Mean loss, and for each picture the scalar product of the gradient by v with the error of v: what running the loss of
# NVlabs/DiffusionNFT at commit 24af555 (scripts/train_nft_sd3.py) in fp64 on the tensors above gave.
AUTHORS = [
    (
        dict(beta=1.0, advantage_range=5.0, kl_weight=1e-4),
        0.05,
        (0.9826244824227844, 0.3536180672582535, -0.6044630917512595, 0.03229848290258048, -0.00770331294502883),
    ),
    (
        dict(beta=0.1, advantage_range=5.0, kl_weight=1e-4),
        0.05,
        (9.627935631179986, 0.3352137926340097, -0.6238098696360392, 0.02191142911194865, -0.00900843698875745),
    ),
    (
        dict(beta=0.1, advantage_range=5.0, kl_weight=0.3),
        0.5,
        (9.905938385674226, 0.5982719998673254, -0.4124444147925403, 0.1741740269165359, 0.04255449770975528),
    ),
    (
        dict(beta=0.5, advantage_range=1.0, kl_weight=0.3),
        0.05,
        (0.392491362596972, 0.16884959000010824, -0.12281625702515515, 0.022266274606241764, -0.008626418341589587),
    ),
]


@pytest.mark.parametrize("settings, distance, pinned", AUTHORS)
def test_loss_and_gradient_are_the_authors(settings, distance, pinned):
    t = tensors(distance)
    loss, grad, _, _ = ours(t, **settings)
    wanted, wanted_grad = written_out(t, **settings)
    assert loss == pytest.approx(pinned[0], rel=1e-6)
    assert products(t, grad) == pytest.approx(pinned[1:], rel=1e-6, abs=1e-6 * max(map(abs, pinned[1:])))
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert (grad - wanted_grad).norm() < 1e-6 * wanted_grad.norm()


def test_on_policy_the_gradient_is_the_advantages_whatever_beta():
    """-2 s A e / <|e|> of the error e of x0 over the elements, where the policy is the copy that drew."""
    t = tensors(0.0)
    s, e = SIGMA.double().view(4, 1, 1, 1, 1), t["noise"] - t["x0"] - t["old"]
    scale = 4 * math.prod(SHAPE[1:]) * e.abs().mean((1, 2, 3, 4), keepdim=True)
    wanted = -2 * s * ADVANTAGE.double().clamp(-5, 5).view(4, 1, 1, 1, 1) * e / scale
    for beta in (1.0, 0.1):
        grad = ours(t, beta=beta, kl_weight=0.0)[1]
        assert (grad - wanted).norm() < 1e-6 * wanted.norm()


def test_the_policy_and_its_frozen_copies_are_asked_once():
    t = tensors(0.05)
    _, _, metrics, asked = ours(t)
    assert sorted(asked) == ["old", "policy", "reference"]
    mean = lambda name: ((t["v"] - t[name]) ** 2).flatten(1).mean(1).sum().item()  # noqa: E731
    assert metrics["moved"].item() == pytest.approx(mean("old")) and metrics["kl"].item() == pytest.approx(
        mean("reference")
    )
    _, _, metrics, asked = ours(t, kl_weight=0.0)
    assert sorted(asked) == ["old", "policy"] and "kl" not in metrics
    assert set(algorithm(kl_weight=0.0).frozen) == {"old"}


def test_the_copy_follows_as_the_authors():
    """Numbers of their return_decay, whose steps count from 1, for its three settings."""
    steps = (1, 74, 75, 76, 100, 209, 500, 1000)
    kinds = {
        (0, 0.0, 0.0): (0.0,) * 8,
        (0, 0.001, 0.5): (0.001, 0.074, 0.075, 0.076, 0.1, 0.209, 0.5, 0.5),
        (75, 0.0075, 0.999): (0.0, 0.0, 0.0, 0.0075, 0.1875, 0.999, 0.999, 0.999),
    }
    for (first, rate, most), wanted in kinds.items():
        nft = algorithm(old_decay_from=first, old_decay_rate=rate, old_decay_max=most, updates_per_rollout=3)
        old = nft.frozen["old"]
        assert old.every == 3 and [old.decay(step - 1) for step in steps] == pytest.approx(wanted)


def judged(**settings) -> tuple[DiffusionNFT, list[list[Judged]]]:
    """The microbatches of two groups of three pictures."""
    nft = algorithm(group=3, sampling_steps=6, **settings)
    groups = []
    for p in range(2):
        latents = [Randomness(p).normal(f"{i}", 0, "x0", (16, 1, 4, 4 + 4 * p)) for i in range(3)]
        scores = {"reward": torch.arange(3.0) + 10 * p}
        condition = Condition(torch.ones(3 + p, 8))
        groups.append(Group(Prompt(f"p{p}", "any", {}), 7, condition, latents, [], scores, torch.arange(3.0) - 1))
    return nft, nft.microbatches(groups, [])


def test_every_picture_is_trained_at_levels_of_its_own():
    """All but one of the schedule's by default, none twice; packs keep to the budget and leave nothing out."""
    nft, packs = judged(max_tokens=30)
    rng, seen = Randomness(3), {}
    for pack in packs:
        assert 1 < len(pack) and sum(len(j.sample.txt) + j.sample.latent[0].numel() // 4 for j in pack) <= 30
        inputs, target = nft.prepare(pack, rng, 16)
        assert target.advantage.tolist() == [j.advantage for j in pack]
        assert target.scores["reward"].tolist() == [j.scores["reward"] for j in pack]
        pieces = inputs.pack.split_targets(inputs.img), inputs.pack.split_targets(target.velocity), inputs.sigma
        for j, x, velocity, sigma in zip(pack, *pieces, strict=True):
            seen.setdefault(j.sample.key, []).append(sigma.item())
            torch.testing.assert_close(x - sigma * velocity, patchify(j.sample.latent), rtol=1e-5, atol=1e-5)
    assert sorted(seen) == [f"p{p}#{i}" for p in range(2) for i in range(3)]
    for key, levels in seen.items():
        assert len(levels) == 5 and set(levels) < set(noise_levels(6, 4 if key < "p1" else 8)[:-1].tolist())
        assert len(set(levels)) == 5
    assert len({tuple(levels) for levels in seen.values()}) > 2
    assert sum(map(len, judged(max_tokens=5, levels=2)[1])) == 12  # pictures larger than a pack go alone


def test_what_is_drawn_for_training_depends_on_the_picture_alone():
    nft, packs = judged(max_tokens=100)
    pack, rng = packs[0], Randomness(3)
    inputs, target = nft.prepare(pack, rng, 16)
    for i, j in enumerate(pack):
        alone, velocity = nft.prepare([j], rng, 16)
        assert torch.equal(alone.sigma[0], inputs.sigma[i])
        assert torch.equal(velocity.velocity, inputs.pack.split_targets(target.velocity)[i])
    sample = replace(pack[0].sample, epoch=8)
    for other in (replace(pack[0], draw=pack[0].draw - 1), replace(pack[0], sample=sample)):
        assert not torch.equal(nft.prepare([other], rng, 16)[1].velocity, nft.prepare(pack[:1], rng, 16)[1].velocity)
    assert not torch.equal(nft.prepare(pack[:1], Randomness(4), 16)[0].img, nft.prepare(pack[:1], rng, 16)[0].img)


@pytest.mark.parametrize("wrong", [dict(levels=11), dict(beta=0.0), dict(advantage_range=6.0), dict(old_decay_max=1.5)])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong)).replace("_", "-")):
        Config(**wrong).completed()


NFT = "posttrain.nft:DiffusionNFT"


def bandit() -> Config:
    return Config(prompts_per_update=1, group=GROUP, size_px=SIZE_PX, sampling_steps=6, levels=3)


def test_reward_rises(tmp_path):
    before, after, metrics = run_world(1, learn, tmp_path, 3e-3, bandit(), NFT, deadline_s=400)[0]
    print(before, after, metrics)
    assert after > before + 0.08 and metrics["kl"] > 0 and metrics["moved"] > 0


def test_without_a_learning_rate_nothing_rises(tmp_path):
    before, after, metrics = run_world(1, learn, tmp_path, 0.0, bandit(), NFT, deadline_s=400)[0]
    assert after == before and metrics["kl"] == metrics["moved"] == 0
