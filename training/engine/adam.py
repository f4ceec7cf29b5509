"""AdamW with the state layout of Transformer Engine's FusedAdam, for machines without it.

The update count lives in the parameter group (`group["step"]`), a parameter's state is `exp_avg` and `exp_avg_sq`.
torch's AdamW keeps a `step` tensor per parameter instead, which Megatron's distributed optimizer shares between all
parameters on loading, so that bias correction drifts after a resume.
"""

import torch
from torch import Tensor

from training.engine.muon import MARK, Muon


class GroupAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101, Algorithm 2) over fp32 tensors, all of a group at once.

    With `muon` set, groups with its mark are updated by it.
    """

    muon: Muon | None = None

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True):
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay is implemented")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=True))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            if params:
                group["step"] = group.get("step", 0) + 1
            if self.muon is not None and group[MARK]:
                self.muon.step(group, lambda p: self._state_of(p)["exp_avg"])
            elif params:
                self._update(params, group)

    def _update(self, params: list[Tensor], group: dict) -> None:
        lr, (beta1, beta2), t = group["lr"], group["betas"], group["step"]
        states = [self._state_of(p) for p in params]
        torch._fused_adamw_(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [torch.full((), float(t), device=params[0].device)] * len(params),
            lr=lr, beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"],
            amsgrad=False, maximize=False,
        )  # fmt: skip

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state.update(exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
        return state


def install(always: bool = False) -> None:
    """Let megatron-core build its optimizers on `GroupAdamW`: always, or without Transformer Engine and Apex."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    if optimizer.USING_PYTORCH_OPTIMIZER or always:
        distributed.USING_TE_OPTIMIZER = False
        optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = GroupAdamW, False
        distributed.Adam, distributed.HAVE_APEX_OR_TE, distributed.USING_APEX_OPTIMIZER = GroupAdamW, True, True
