"""Modulation, gates, and head norm with rotation in the forms that cost least: nothing here changes a result.

Compiled, each is written out and left to the compiler. Eagerly, a run of tokens with one modulation row is one call of
LayerNorm with that row as its weights, and head norm and rotation keep nothing but their input for the backward pass.

Shape legend: L tokens of a stream on this rank, D width, R rows of a modulation table, H heads, K head dim.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.moving import moved
from model.rope import apply_rope

EPS = 1e-6
MIN_RUN = 128
"""Tokens that runs of one modulation row must have on average to be treated run by run."""


@dataclass(frozen=True)
class Rows:
    """Which row of a modulation table [R, D] each token of a stream takes; the tail takes none, or any."""

    one_hot: Tensor
    """[L, R]: `one_hot @ table` gives each token its row (and sums gradients over tokens by a matrix product)."""
    runs: tuple[tuple[int, int], ...] | None
    """The same as (length, row) of consecutive runs, where a whole stream is on this rank and runs are long enough
    for one call each to cost less than the product."""
    each: tuple[Tensor | None, int, int] | None = None
    """The same as (row of each sample, or None if those are the first ones; samples; tokens of each), where all have
    equally many and there is no tail."""

    @classmethod
    def of(
        cls, lengths: list[int], rows: list[int], total: int, n_rows: int, like: Tensor, whole: bool = True
    ) -> "Rows":
        """Rows of consecutive runs of `lengths` in a stream of `total` tokens; `like` gives device and dtype.

        Not `whole`: the stream is cut later, for which the product is needed.
        """
        lengths, rows = zip(*((n, row) for n, row in zip(lengths, rows, strict=True) if n), strict=True)
        tail = total - sum(lengths)
        runs: list[tuple[int, int]] = []
        for length, row in [*zip(lengths, rows, strict=True), (tail, rows[-1])]:
            if runs and runs[-1][1] == row:
                runs[-1] = (runs[-1][0] + length, row)
            elif length:
                runs.append((length, row))
        if whole and like.device.type == "cpu" and len(set(lengths)) == 1 and not tail and total < MIN_RUN * len(runs):
            in_order = rows == tuple(range(len(rows)))
            return cls(like.new_empty(0), None, (None if in_order else torch.tensor(rows), len(rows), lengths[0]))
        index = np.repeat([*rows, -1], [*lengths, tail])
        one_hot = moved(torch.from_numpy(index), like.device)[:, None] == torch.arange(n_rows, device=like.device)
        return cls(one_hot.to(like.dtype), tuple(runs) if total >= MIN_RUN * len(runs) else None)

    def prefix(self, length: int) -> "Rows":
        """The rows of the first `length` tokens."""
        if self.each is not None:
            index, _, tokens = self.each
            samples = length // tokens
            return Rows(self.one_hot, None, (None if index is None else index[:samples], samples, tokens))
        if torch.compiler.is_compiling() or self.runs is None:
            return Rows(self.one_hot[:length], None)
        runs, left = [], length
        for run, row in self.runs:
            if left:
                runs.append((min(run, left), row))
                left -= runs[-1][0]
        return Rows(self.one_hot[:length], tuple(runs))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, rows: Rows) -> Tensor:
    """AdaLN: LayerNorm without affine, then x * (1 + scale) + shift with each token's row.

    x [L, D]; shift, scale [R, D]. Over a run of tokens with one row, this is LayerNorm with that row as its weights.
    """
    if rows.each is not None:
        normed = _by_sample(F.layer_norm(x, x.shape[-1:], eps=EPS), rows)
        return torch.addcmul(_of_samples(shift, rows), normed, _of_samples(scale, rows) + 1).flatten(0, 1)
    if torch.compiler.is_compiling() or rows.runs is None:
        return torch.addcmul(rows.one_hot @ shift, F.layer_norm(x, x.shape[-1:], eps=EPS), rows.one_hot @ scale + 1)
    weight, bias = (1 + scale).unbind(), shift.unbind()
    return _by_run(lambda row, x: F.layer_norm(x, x.shape[-1:], weight[row], bias[row], EPS), rows.runs, x)


def add_gated(x: Tensor, y: Tensor, gate: Tensor, rows: Rows) -> Tensor:
    """x + gate * y with each token's row of gate [R, D]."""
    if rows.each is not None:
        return torch.addcmul(_by_sample(x, rows), _of_samples(gate, rows), _by_sample(y, rows)).flatten(0, 1)
    if torch.compiler.is_compiling() or rows.runs is None:
        return torch.addcmul(x, rows.one_hot @ gate, y)
    gates = gate.unbind()
    return _by_run(lambda row, x, y: torch.addcmul(x, gates[row], y), rows.runs, x, y)


def _by_sample(x: Tensor, rows: Rows) -> Tensor:
    return x.unflatten(0, (-1, rows.each[2]))


def _of_samples(table: Tensor, rows: Rows) -> Tensor:
    """[S, 1, D], the row of each sample."""
    index, samples, _ = rows.each
    return (table[:samples] if index is None else table[index])[:, None]


def _by_run(function: Callable[..., Tensor], runs: tuple[tuple[int, int], ...], *streams: Tensor) -> Tensor:
    lengths = [length for length, _ in runs]
    pieces = zip(*(s.split(lengths) for s in streams), strict=True)
    out = [function(row, *piece) for (_, row), piece in zip(runs, pieces, strict=True)]
    return torch.cat(out) if len(out) > 1 else out[0]


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (arXiv 1606.08415). Compiled, by the sigmoid of twice the argument, which is the same and
    takes a CPU half the time."""
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x))
    return F.gelu(x, approximate="tanh")


class HeadNorm(nn.RMSNorm):
    """RMSNorm over the head dim of x [L, H, K], then rotation by table [L, K / 2, 2], in one.

    A module's own call, so that what hooks into its forward pass, such as a late gathering of weights, is met.
    """

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return norm_rotate(x, self.weight, self.eps, table)


def norm_rotate(x: Tensor, weight: Tensor, eps: float, table: Tensor) -> Tensor:
    """RMSNorm over the head dim of x [L, H, K], then `apply_rope`; keeps nothing but x for the backward pass."""
    if torch.compiler.is_compiling():
        return apply_rope(F.rms_norm(x, x.shape[-1:], weight, eps), table)
    return _NormRotate.apply(x, weight, eps, torch.view_as_complex(table))


class _NormRotate(torch.autograd.Function):
    """y = R(n), n = w * xhat, xhat = x * r, r = (mean x^2 + eps)^-1/2, with R a product of complex numbers.

    On the CPU it goes through the tokens in pieces that fit the cache.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, table: Tensor) -> Tensor:
        y, rms = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        for part in _pieces(x):
            r = torch.linalg.vector_norm(x[part], dim=-1, keepdim=True, dtype=torch.float32)
            r = r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            _turn((x[part] * r).mul_(weight), table[part], out=y[part])
            rms[part] = r
        ctx.save_for_backward(x, weight, table, rms)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, table, rms = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        for part in _pieces(x):
            dn = _turn(grad[part], table[part].conj())
            xhat = x[part] * rms[part]
            product = dn * xhat
            dweight += product.sum((0, 1))
            mean = (product @ weight.float())[..., None].div_(-x.shape[-1])
            torch.mul(dn.mul_(weight).addcmul_(xhat, mean), rms[part], out=dx[part])
        return dx, dweight.to(weight.dtype), None, None


def _turn(x: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply channel pairs of x [L, H, K], as complex numbers, by table [L, K/2], in fp32; into `out` if given."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    if out is not None and out.dtype == torch.float32:
        torch.mul(pairs, table[:, None], out=torch.view_as_complex(out.unflatten(-1, (-1, 2))))
        return out
    turned = torch.view_as_real(pairs * table[:, None]).flatten(-2)
    return turned if out is None else out.copy_(turned)


def _pieces(x: Tensor) -> list[slice]:
    """Runs of tokens that fill a mebibyte of fp32 on a CPU; all tokens elsewhere."""
    step = max(1, 2**18 // x[0].numel()) if x.device.type == "cpu" else len(x)
    return [slice(start, start + step) for start in range(0, len(x), step)]
