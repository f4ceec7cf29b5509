"""Clipping of the gradient by its norm, which stays on the device until it is read with all else.

Megatron reads each parameter's norm on the host where neither Transformer Engine nor Apex is installed.
"""

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def squared_norms(optimizer: DistributedOptimizer, loss: Tensor, member: Tensor) -> Tensor:
    """Square of the whole gradient's norm, number of ranks whose loss is not finite, squares of the norms of groups of
    gradients: fp32 [2 + groups], alike on all ranks. Collective; after `optimizer.prepare_grads`.

    `member` bool [groups, n]: which of this rank's gradients are in which group.
    """
    grads = optimizer.get_main_grads_for_grad_norm() if optimizer.get_parameters() else []
    norms = torch.stack(torch._foreach_norm(grads)) if grads else loss.new_zeros(0, dtype=torch.float32)
    whole = torch.stack([torch.linalg.vector_norm(norms).square(), (~loss.isfinite()).float()])
    found = torch.cat([whole, by_group(member, norms.square())])
    dist.all_reduce(found, group=optimizer.get_grad_stats_parallel_group())
    return found


def by_group(member: Tensor, squares: Tensor) -> Tensor:
    """Sum of squares [n] over each group of `member` [groups, n]; one that is not finite stays with its group."""
    return torch.where(member, squares, 0).sum(1)


def clip(optimizer: DistributedOptimizer, largest: float, norm: float) -> None:
    """Scale the gradient, whose norm is `norm`, down to the norm `largest` if it has more."""
    share = largest / (norm + 1e-6)
    grads = [p.grad for p in optimizer.get_parameters() if p.grad is not None]
    if share < 1 and grads:
        torch._foreach_mul_(grads, share)
