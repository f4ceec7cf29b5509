"""GroupAdamW against torch's AdamW, and its state layout."""

import pytest
import torch

from training.engine.adam import GroupAdamW


def test_equals_torchs_adamw():
    torch.manual_seed(0)
    shapes = [(3, 4), (5,), (0,), (2, 2, 2)]
    ours = [torch.randn(s) for s in shapes]
    theirs = [p.clone().requires_grad_() for p in ours]
    settings = dict(lr=3e-3, betas=(0.8, 0.95), eps=1e-7)
    groups = lambda p: [{"params": p[:2], "weight_decay": 0.2}, {"params": p[2:], "weight_decay": 0.0}]  # noqa: E731
    a, b = GroupAdamW(groups(ours), **settings), torch.optim.AdamW(groups(theirs), **settings)
    for step in range(20):
        for x, y in zip(ours, theirs, strict=True):
            y.grad = torch.randn_like(y) * 10.0 ** (step % 5 - 3)
            x.grad = y.grad.clone()
        if step == 7:  # a parameter without gradient is left alone
            ours[1].grad = theirs[1].grad = None
            theirs_before = theirs[1].detach().clone()
        for group in (*a.param_groups, *b.param_groups):
            group["lr"] = 3e-3 / (1 + step)
        a.step(), b.step()
        if step == 7:
            assert torch.equal(theirs[1], theirs_before)
            break
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y.detach(), rtol=2e-6, atol=1e-7)


def test_state_has_fused_adams_layout():
    weight = torch.ones(3)
    optimizer = GroupAdamW([weight], lr=0.1)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1 and set(optimizer.state[weight]) == {"exp_avg", "exp_avg_sq"}


def test_refuses_coupled_weight_decay():
    with pytest.raises(ValueError, match="decoupled"):
        GroupAdamW([torch.ones(1)], lr=0.1, adam_w_mode=False)
