"""Muon: momentum whose update is orthogonalised (Keller Jordan et al., 2024), for the matrices of a model's blocks.

It takes the place of AdamW in the parameter group that `own_group` makes and keeps AdamW's state layout, so that
checkpoints stay reshardable: `exp_avg` is the momentum, `exp_avg_sq` stays zero. A distributed optimizer holds slices
that know no rows; they are put together for each step, and every rank orthogonalises the matrices of which it has a
part.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.optimizer import get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import OptimizerConfig, ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from training.engine.shards import Shards

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration."""
AT_ONCE = 2**26
"""Elements of matrices of one shape that are orthogonalised together, at most."""
MARK = "is_decoupled_lr"
"""Megatron's mark of a parameter group with a learning rate of its own; it tells groups apart in a checkpoint."""


def is_matrix(name: str, param: Tensor) -> bool:
    """Whether Muon takes a parameter: a matrix of a block, modulation aside."""
    return param.ndim == 2 and "blocks." in name and ".mod." not in name


def own_group(config: OptimizerConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Megatron's standard parameter groups and one, with MARK, for Muon's matrices."""
    matrices = ParamWithNamePredicate("Muon's matrices", lambda param, name: is_matrix(name, param))
    return {**get_standard_config_overrides(config), ParamKey(with_name_predicate=matrices): {MARK: True}}


@dataclass(frozen=True)
class Muon:
    """The update of a parameter group.

    A whole matrix [o, i] moves by lr sqrt(max(1, o / i)) times its Nesterov momentum, orthogonalised, and decays as in
    AdamW. `dtype` is the iteration's.
    """

    shards: Shards
    dtype: torch.dtype

    @torch.no_grad()
    def step(self, group: dict, momentum: Callable[[Tensor], Tensor]) -> None:
        """Update a group's slices from their gradients; `momentum` gives the state of a slice. Collective."""
        mine = {id(p) for p in group["params"] if p.grad is not None and p.numel()}
        slices = {name: p for name, p in self.shards.masters().items() if id(p) in mine}
        weights, ahead = list(slices.values()), []
        if weights:
            grads, moving = [p.grad for p in weights], [momentum(p) for p in weights]
            torch._foreach_lerp_(moving, grads, 1 - MOMENTUM)
            ahead = torch._foreach_lerp(grads, moving, MOMENTUM)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        for name, update in self._orthogonalised(dict(zip(slices, ahead, strict=True))):
            start, end = self.shards.range_of(name)
            rate = group["lr"] * max(1, update.shape[0] / update.shape[1]) ** 0.5
            slices[name].sub_(update.flatten()[start:end], alpha=rate)

    def _orthogonalised(self, slices: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, whole orthogonal matrix) for each of `slices`, from all ranks' slices."""
        alike: dict[tuple[int, ...], dict[str, Tensor]] = defaultdict(dict)
        for name, whole in self.shards.gather(slices, self.dtype):
            if name in slices:
                alike[tuple(whole.shape)][name] = whole
        for (o, i), matrices in alike.items():
            names, count = list(matrices), max(1, AT_ONCE // (o * i))
            for some in (names[at : at + count] for at in range(0, len(names), count)):
                done = orthogonal(torch.stack([matrices[n] for n in some])).float()
                yield from zip(some, done, strict=True)


def orthogonal(x: Tensor) -> Tensor:
    """About U V^T for each matrix U S V^T of x [n, o, i]: five steps bring singular values to .7 ... 1.2."""
    a, b, c = COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
