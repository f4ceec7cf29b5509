"""Ops: the factories an MMDiT is built from, so that one model file serves one process and a cluster alike.

`Ops` here is the single-process set (plain torch). `training/engine/ops.py` has the Megatron / Transformer-Engine
set, in which a *column* layer holds a slice of the outputs (heads), a *row* layer a slice of the inputs, and token
streams may be split over the tensor- and context-parallel ranks.

Shape legend: L tokens held by this rank, D width, H heads held by this rank, K head dim.
"""

import torch
from torch import Tensor, nn

from model.attention import joint_attention
from model.fused import HeadNorm
from model.packing import Pack


class Ops:
    """Single-process layers. Subclasses must keep every signature and the meaning of each method.

    A layer may store its weight in another form: it then has `in_features`, `out_features` and `load_weight(full)`.
    """

    shards = 1
    """Pieces that a token stream is cut into (tensor x context parallel ranks with sequence parallelism)."""

    heads_divisor = 1
    """The number of heads must be divisible by this (tensor x context parallel size)."""

    token_multiple = 1
    """What the number of tokens that a linear layer is given on a rank must be a multiple of."""

    @property
    def adapters(self) -> "Ops":
        """What makes the layers of adapters, which train, beside these."""
        return self

    def column(self, in_features: int, out_features: int) -> nn.Module:
        """Linear [L, in] -> [L, out slice of this rank]; input and output of the parallel region differ in width."""
        return nn.Linear(in_features, out_features)

    def row(self, in_features: int, out_features: int) -> nn.Module:
        """Linear [L, in slice of this rank] -> [L, out], summed over the tensor-parallel ranks."""
        return nn.Linear(in_features, out_features)

    def replicated(self, in_features: int, out_features: int) -> nn.Module:
        """Linear applied by every rank to its own tokens."""
        return nn.Linear(in_features, out_features)

    def vector(self, in_features: int, out_features: int) -> nn.Module:
        """Linear on per-sample vectors [S, in] that every rank holds whole (the time embedding)."""
        return nn.Linear(in_features, out_features)

    def modulation(self, in_features: int, out_features: int) -> nn.Module:
        """Linear [S, in] -> [S, out] on per-sample vectors, its weight sharded, its output whole on every rank."""
        return nn.Linear(in_features, out_features)

    def token_norm(self, dim: int, eps: float) -> nn.Module:
        """RMSNorm with weight over tokens [L, dim]."""
        return nn.RMSNorm(dim, eps=eps)

    def head_norm(self, dim: int, eps: float) -> nn.Module:
        """RMSNorm with weight over the head dim of [L, H, dim], then rotation; sees only this rank's heads."""
        return HeadNorm(dim, eps=eps)

    def tokens_to_end(self, pack: Pack) -> int:
        """Image tokens computed to the end where streams are whole: the targets, rounded up to `token_multiple`."""
        if self.token_multiple == 1:
            return pack.n_target
        return min(-(-pack.n_target // self.token_multiple) * self.token_multiple, len(pack.img_pos))

    def shard_tokens(self, x: Tensor) -> Tensor:
        """Whole stream [L_all, ...] -> the tokens on which this rank runs norms and residuals."""
        return x

    def shard_context(self, x: Tensor) -> Tensor:
        """Whole stream [L_all, ...] -> the tokens this rank holds inside attention projections."""
        return x

    def gather_tokens(self, x: Tensor) -> Tensor:
        """Inverse of `shard_tokens`, differentiable: [L, ...] -> [L_all, ...] on every rank."""
        return x

    def attention(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
        """Joint attention; q, k, v are [L_txt + L_img, H, K] of this rank (text first) and so is the result."""
        return joint_attention(q, k, v, pack)


def local_shard(param: Tensor, full: Tensor) -> Tensor:
    """This rank's slice of a whole weight; `param.tp_shard = (dim, rank, size)` says which (absent: all of it)."""
    dim, rank, size = getattr(param, "tp_shard", (0, 0, 1))
    if full.shape[dim] != param.shape[dim] * size:
        raise ValueError(f"a weight of shape {tuple(full.shape)} does not give {size} slices of {tuple(param.shape)}")
    return full if size == 1 else full.chunk(size, dim)[rank]


def full_shape(param: Tensor) -> torch.Size:
    """Shape of the whole weight of which `param` is this rank's slice."""
    dim, _, size = getattr(param, "tp_shard", (0, 0, 1))
    return torch.Size(s * size if d == dim else s for d, s in enumerate(param.shape))


def whole_shape(model: nn.Module, name: str) -> torch.Size:
    """Shape of the whole weight called `name`, of which `model` may hold a slice, or another form."""
    layer = model.get_submodule(name.rpartition(".")[0])
    if name.endswith(".weight") and hasattr(layer, "load_weight"):
        return torch.Size((layer.out_features, layer.in_features))
    return full_shape(model.get_parameter(name))


@torch.no_grad()
def fill_weight(model: nn.Module, name: str, full: Tensor) -> None:
    """Set the weight called `name`, or this rank's slice of it, from the whole. ValueError if the shapes differ."""
    layer = model.get_submodule(name.rpartition(".")[0])
    if name.endswith(".weight") and hasattr(layer, "load_weight"):
        layer.load_weight(full)
    else:
        param = model.get_parameter(name)
        param.copy_(local_shard(param, full))
