"""AdamW with the state layout of Transformer Engine's FusedAdam, for machines without it.

The update count lives in the parameter group (`group["step"]`), a parameter's state is `exp_avg` and `exp_avg_sq`.
torch's AdamW keeps a `step` tensor per parameter instead, which Megatron's distributed optimizer shares between all
parameters on loading, so that bias correction drifts after a resume.
"""

import torch
from torch import Tensor


class GroupAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101, Algorithm 2) over fp32 tensors, all of a group at once."""

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True):
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay is implemented")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=True))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            if not params:
                continue
            group["step"] = group.get("step", 0) + 1
            self._update(params, group)

    def _update(self, params: list[Tensor], group: dict) -> None:
        lr, (beta1, beta2), t = group["lr"], group["betas"], group["step"]
        for p in params:
            if not self.state[p]:
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        grads = [p.grad for p in params]
        first = [self.state[p]["exp_avg"] for p in params]
        second = [self.state[p]["exp_avg_sq"] for p in params]
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, (1 - beta2**t) ** 0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(params, first, denominator, -lr / (1 - beta1**t))


def install() -> None:
    """Let megatron-core build its optimizers on `GroupAdamW` where Transformer Engine and Apex are missing."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = GroupAdamW, False
        distributed.Adam, distributed.HAVE_APEX_OR_TE, distributed.USING_APEX_OPTIMIZER = GroupAdamW, True, True
