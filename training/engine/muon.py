"""Muon: momentum whose update is orthogonalised (Keller Jordan et al., 2024), for the matrices of a model's blocks.

It takes the place of AdamW in a parameter group of its own (`groups.py`) and keeps AdamW's state layout, so that
checkpoints stay reshardable: `exp_avg` is the momentum, `exp_avg_sq` stays zero. In every parallel layout a whole
matrix is put together on one rank of those that share it, orthogonalised there and sent back in slices. A
Newton-Schulz iteration spread over tensor-parallel ranks would need a reduction for every product; so each element
travels twice, every rank does 1/n of the work, and the arithmetic is that of one process.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from training.engine.device import Layout
from training.engine.exchange import Exchange
from training.engine.shards import Shards

MOMENTUM = 0.95
COEFFICIENTS = (
    (8.2193, -23.3375, 16.6266), (3.9641, -2.8377, 0.5158), (3.4368, -2.4752, 0.4762), (2.4901, -1.8343, 0.4368),
)  # fmt: skip
"""a, b, c of four Newton-Schulz iterations X -> (a + b X X^T + c (X X^T)^2) X: Polar Express (arXiv 2505.16932) for
singular values from .003 to 1, which end in .78 ... 1.2. The first three are for values up to 1.02 times what they
should be, so that rounding does not throw one out of where the next converges."""
LONG = 1.5
"""Ratio of a matrix's sides from which iterations run on the small side's Gram matrix."""
MARK = "is_decoupled_lr"
"""Megatron's mark of a parameter group with a learning rate of its own; it tells groups apart in a checkpoint."""


def is_matrix(name: str, param: Tensor) -> bool:
    """Whether Muon takes a parameter: a matrix of a block, modulation aside."""
    return param.ndim == 2 and "blocks." in name and ".mod." not in name


class Muon:
    """The update of a parameter group.

    A whole matrix [o, i] moves by lr sqrt(max(1, o / i)) times its Nesterov momentum, orthogonalised, and decays as in
    AdamW. `dtype` is the iteration's, and that of what travels.
    """

    def __init__(self, shards: Shards, layout: Layout, dtype: torch.dtype):
        masters, params = shards.masters(), shards.ddp.module.named_parameters()
        names = [name for name, param in params if param.requires_grad and is_matrix(name, param)]
        self.exchange = Exchange(shards, layout, names, cost=lambda o, i: o * i * min(o, i))
        self._masters = {name: masters[name] for name in names if name in masters}
        self._device, self._dtype = layout.device, dtype

    @torch.no_grad()
    def step(self, group: dict, momentum: Callable[[Tensor], Tensor]) -> None:
        """Update this rank's slices from their gradients; `momentum` gives the state of a slice. Collective."""
        slices, shapes = self.exchange.slices, self.exchange.shapes
        ahead = torch.empty(self.exchange.size, dtype=self._dtype, device=self._device)
        for name, weight in self._masters.items():  # one by one: each stays in the cache for all that is done to it
            moving = momentum(weight).lerp_(weight.grad, 1 - MOMENTUM)
            ahead[slices[name]].copy_(weight.grad.lerp(moving, MOMENTUM))
        update = self.exchange.applied(ahead, orthogonal)
        for name, weight in self._masters.items():
            o, i = shapes[name]
            rate = group["lr"] * max(1, o / i) ** 0.5
            weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update[slices[name]], alpha=-rate)


def orthogonal(x: Tensor) -> Tensor:
    """About U V^T for each matrix U S V^T of x [n, o, i].

    Singular values from .003 of (sum of s^4)^(1/4), no less than the largest of them and no more than Frobenius' norm,
    come to .78 ... 1.2, smaller ones to 346 times as much; sums below 1e-9 are not scaled up any further. Long
    matrices take two iterations at a time on their Gram matrix G, X <- p2(G p1(G)^2) p1(G) X: at four times the width
    72 % of the work. All four at once would be 58 %, but in bf16 the product's rounding errors, which are relative to
    its gain for the smallest singular values, then overwhelm the largest ones.
    """
    tall, short, long = x.shape[1] > x.shape[2], min(x.shape[1:]), max(x.shape[1:])
    together = 2 if long > LONG * short else 1
    for at in range(0, len(COEFFICIENTS), together):
        gram = x.mT @ x if tall else x @ x.mT
        if at == 0:
            squared = gram.norm(dim=(1, 2), keepdim=True).float().clamp_min(1e-18)
            gram.div_(squared)
        if together == 1:
            product = _polynomial(gram, *COEFFICIENTS[at])
        else:
            product = _polynomial(gram.clone(), *COEFFICIENTS[at])
            product = product @ _polynomial(product @ gram @ product, *COEFFICIENTS[at + 1])
        if at == 0:
            product.div_(squared.sqrt())
        x = x @ product if tall else product @ x
    return x


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """a + b G + c G^2 as c (G + b / 2c)^2 + (a - b^2 / 4c), which reads and writes diagonals beside the one product;
    overwrites G."""
    gram.diagonal(dim1=1, dim2=2).add_(b / (2 * c))
    out = torch.empty_like(gram).baddbmm_(gram, gram, beta=0, alpha=c)
    out.diagonal(dim1=1, dim2=2).add_(a - b * b / (4 * c))
    return out
