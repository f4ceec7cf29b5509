import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from data_pipeline.sample import EncodedSample
from model.config import MMDiTConfig
from model.mmdit import MMDiT
from posttrain.dpo import DPO, dpo_loss
from posttrain.preference import Pair, best_and_worst
from training.randomness import Randomness

CONFIG = MMDiTConfig(2, 2, 16, joint_attention_dim=8, in_channels=16, out_channels=4, axes_dims_rope=(4, 6, 6))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(i, size=(4, 1, 4, 6), txt=3):
    win, lose = (
        EncodedSample(f"{i}-{n}", randn(*size, seed=10 * i + s), randn(txt, 8, seed=10 * i + 5))
        for s, n in enumerate(("win", "lose"))
    )
    return Pair(str(i), win, lose)


def model(seed=0):
    """A small MMDiT whose output depends on everything (adaLN-Zero would give 0)."""
    net = MMDiT(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return net


def dpo(beta, positive=0.0):
    """The algorithm apart from where its pairs come from."""
    algorithm = object.__new__(DPO)
    algorithm.config = SimpleNamespace(beta=beta, positive=positive)
    return algorithm


def step(algorithm, policy, reference, batch, seed=0):
    inputs, target = algorithm.prepare(batch, Randomness(seed), 16)
    return algorithm.loss(policy, {"reference": torch.no_grad()(reference.__call__)}, inputs, target)


def test_loss_and_gradient_equal_the_papers_formula_written_out():
    """-log sigma(-beta (d - d_ref)), d = |v(win) - v_win|^2 - |v(lose) - v_lose|^2, one pair at a time."""
    errors = torch.rand(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    reference = torch.rand(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses, _ = dpo_loss(errors, reference, beta=7.0)
    (got,) = torch.autograd.grad(losses.sum(), errors)
    for i in range(5):
        delta = (errors[0, i] - errors[1, i]) - (reference[0, i] - reference[1, i])
        wanted = -torch.log(1 / (1 + torch.exp(7.0 * delta)))
        (grad,) = torch.autograd.grad(wanted, errors)
        torch.testing.assert_close(losses[i], wanted)
        torch.testing.assert_close(got[:, i], grad[:, i])


@pytest.mark.parametrize("positive", [0.0, 2.0])
def test_objective_equals_independent_loop_over_pairs(positive: float):
    """Whole path: model, packs, noise and noise levels, against plain tensors and one forward a picture."""
    policy, reference, batch = model(1), model(2), [pair(1), pair(2, size=(4, 1, 2, 8), txt=7)]
    loss, weight, metrics = step(dpo(3.0, positive), policy, reference, batch)
    loss.backward()
    got = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()

    from model.packing import pack_inputs, unpatchify

    rng, total = Randomness(0), 0.0
    for p in batch:
        sigma, eps = rng.uniform(p.key, 0, "sigma"), rng.normal(p.key, 0, "noise", tuple(p.win.latent.shape))
        mse = {}
        for net in (policy, reference):
            for s in (p.win, p.lose):
                x = (1 - sigma) * s.latent + sigma * eps
                _, f, h, w = x.shape
                v = unpatchify(net(pack_inputs([x], [s.txt], sigma[None], align=1)), (f, h // 2, w // 2))
                mse[net, s.key] = F.mse_loss(v, eps - s.latent)
        inner = mse[policy, p.win.key] - mse[policy, p.lose.key]
        inner = inner - (mse[reference, p.win.key] - mse[reference, p.lose.key]).detach()
        worse = mse[policy, p.win.key] - mse[reference, p.win.key].detach()
        total = total - F.logsigmoid(-3.0 * (inner + positive * max(worse, 0 * worse)))
    total.backward()
    assert weight == 2.0
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    assert set(got) == {n for n, p in policy.named_parameters() if p.grad is not None}
    for name, p in policy.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-4 * p.grad.abs().max().item() + 1e-7)


def test_policy_equal_to_reference_is_undecided():
    batch = [pair(1), pair(2), pair(3)]
    loss, weight, metrics = step(dpo(beta=100.0), model(1), model(1), batch)
    assert loss.item() / weight == pytest.approx(math.log(2))
    assert metrics["accuracy"].item() / weight == 0.5
    for name in ("margin", "win_gain", "lose_gain"):
        assert metrics[name].item() == 0.0


def test_swapping_winner_and_loser_turns_the_margin_around():
    policy, reference = model(1), model(2)
    batch = [pair(1), pair(2)]
    swapped = [Pair(p.key, p.lose, p.win) for p in batch]
    _, _, one = step(dpo(beta=1.0), policy, reference, batch)
    _, _, other = step(dpo(beta=1.0), policy, reference, swapped)
    torch.testing.assert_close(one["margin"], -other["margin"])
    assert one["accuracy"] + other["accuracy"] == len(batch)


def test_training_moves_the_margin_and_the_control_does_not():
    policy, reference, batch = model(1), model(1), [pair(1), pair(2)]
    objective = dpo(beta=50.0)
    heldout = 99

    def margin():
        with torch.no_grad():
            return step(objective, policy, reference, batch, heldout)[2]["margin"].item()

    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)
    for lr, steps in ((0.0, 5), (2e-3, 25)):
        optimizer.param_groups[0]["lr"] = lr
        for i in range(steps):
            optimizer.zero_grad()
            step(objective, policy, reference, batch, i)[0].backward()
            optimizer.step()
        if not lr:
            assert margin() == 0.0
    assert margin() > 0.05
    _, weight, metrics = step(objective, policy, reference, batch, heldout)
    assert metrics["accuracy"].item() == weight


def test_pairs_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="one size"):
        Pair("k", pair(1).win, pair(2, size=(4, 1, 2, 8)).lose)


def test_best_and_worst_need_a_gap():
    assert best_and_worst(torch.tensor([0.2, 0.9, 0.1, 0.9]), 0.5) == (1, 2)
    assert best_and_worst(torch.tensor([0.2, 0.4]), 0.5) is None
    assert best_and_worst(torch.tensor([0.3, 0.3]), 0.0) is None
