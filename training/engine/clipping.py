"""Clipping of the gradient by its norm, which stays on the device until it is read with all else.

Megatron reads each parameter's norm on the host where neither Transformer Engine nor Apex is installed.
"""

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def squared_norm(optimizer: DistributedOptimizer, loss: Tensor) -> tuple[Tensor, Tensor]:
    """(square of the norm of the whole gradient, number of ranks whose loss is not finite), fp32 scalars, alike on all
    ranks. Collective; after `optimizer.prepare_grads`."""
    grads = optimizer.get_main_grads_for_grad_norm() if optimizer.get_parameters() else []
    norms = torch.stack(torch._foreach_norm(grads)) if grads else loss.new_zeros(1, dtype=torch.float32)
    found = torch.stack([torch.linalg.vector_norm(norms).square(), (~loss.isfinite()).float()])
    dist.all_reduce(found, group=optimizer.get_grad_stats_parallel_group())
    return found.unbind()


def clip(optimizer: DistributedOptimizer, largest: float, norm: float) -> None:
    """Scale the gradient, whose norm is `norm`, down to the norm `largest` if it has more."""
    share = largest / (norm + 1e-6)
    grads = [p.grad for p in optimizer.get_parameters() if p.grad is not None]
    if share < 1 and grads:
        torch._foreach_mul_(grads, share)
