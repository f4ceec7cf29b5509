"""Joint attention over a pack: every sample attends to itself only, whatever else shares the batch.

Shape legend: L = Lt + Li tokens, H heads, K head dim; q, k, v are [L, H, K] with the text stream first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.packing import Pack

LONGEST_PRODUCT = 2048
"""Tokens up to which attention on a CPU in bf16 may keep its matrix of weights for the backward pass."""


def joint_attention(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
    """Attention per sample of the pack; takes and returns the order [text stream, image stream]."""
    if pack.even is not None:
        return even_attention(q, k, v, pack)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and max(pack.segment_lengths) <= LONGEST_PRODUCT:
        return padded_attention(q, k, v, pack)
    if pack.in_joint_order:
        return varlen_attention(q, k, v, pack)
    order, inverse = pack.joint_order, pack.inverse_order
    q, k, v = (permute(x, order, inverse) for x in (q, k, v))
    return permute(varlen_attention(q, k, v, pack), inverse, order)


def even_attention(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
    """The same for an even pack, whose samples are one batch as they are. Padding attends, and is not attended to."""
    even = pack.even

    def samples(x: Tensor) -> Tensor:
        parts = x.split((even.samples * even.text, even.samples * even.image))
        return torch.cat([part.unflatten(0, (even.samples, -1)) for part in parts], dim=1).transpose(1, 2)

    q, k, v = map(samples, (q, k, v))
    bias = even.bias.to(q.dtype)
    if q.dtype == torch.bfloat16 and q.shape[2] <= LONGEST_PRODUCT:
        out = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, bias)
    return torch.cat([part.flatten(0, 1) for part in out.transpose(1, 2).split((even.text, even.image), dim=1)])


def padded_attention(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
    """The same by matrix products over samples of about one length, padded to the longest of them.

    For bf16 on a CPU, where the fused kernel's backward pass is slow and so are many small calls. The tail gets zeros.
    """
    groups, slots = pack.padded
    sizes = [count * length for count, length, _ in groups]
    q, k, v = (_Spread.apply(x, slots, sum(sizes)).split(sizes) for x in (q * q.shape[-1] ** -0.5, k, v))
    out = []
    for (count, length, bias), *qkv in zip(groups, q, k, v, strict=True):
        qs, ks, vs = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
        weights = (qs @ ks.transpose(-1, -2)).add_(bias.to(qs.dtype)).softmax(-1)
        out.append((weights @ vs).transpose(1, 2).flatten(0, 1))
    return _Collect.apply(torch.cat(out) if len(out) > 1 else out[0], slots)


class _Spread(torch.autograd.Function):
    """Rows of x at their slots among `length`, zeros between; a slot from `length` on is nowhere."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(slots)
        return _spread(x, slots, length)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return _collect(grad, *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    """The inverse: the rows at `slots`, zeros for slots that are nowhere."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.length = len(x)
        return _collect(x, slots)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return _spread(grad, *ctx.saved_tensors, ctx.length), None


def _spread(x: Tensor, slots: Tensor, length: int) -> Tensor:
    return x.new_zeros(length + len(x), *x.shape[1:]).index_copy_(0, slots, x)[:length]


def _collect(x: Tensor, slots: Tensor) -> Tensor:
    nowhere = slots >= len(x)
    return x.index_select(0, slots.masked_fill(nowhere, 0)).masked_fill_(nowhere[:, None, None], 0)


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x[order] for a permutation; its gradient is g[inverse], a gather where indexing's own would scatter and add."""
    return _Permute.apply(x, order, inverse)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, *ctx.saved_tensors), None, None


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
    """Attention within the segments of the pack; q, k, v and the result [L, H, K] are in joint order.

    Segments of one length run as one batch, so that a batch of equal samples costs a single call.
    """
    lengths = pack.segment_lengths
    runs, start = [], 0
    while start < len(lengths):
        stop = start + 1
        while stop < len(lengths) and lengths[stop] == lengths[start]:
            stop += 1
        runs.append((stop - start, lengths[start]))
        start = stop
    sizes = [n * length for n, length in runs]
    out = []
    for (n, length), qs, ks, vs in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        qs, ks, vs = (x.unflatten(0, (n, length)).transpose(1, 2) for x in (qs, ks, vs))
        out.append(F.scaled_dot_product_attention(qs, ks, vs).transpose(1, 2).flatten(0, 1))
    return torch.cat(out) if len(out) > 1 else out[0]
