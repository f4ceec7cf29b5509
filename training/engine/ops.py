"""The MMDiT's layers over tensor-, sequence- and context-parallel ranks (see `model/ops.py` for what each must do).

Tensor parallelism splits heads and MLP channels (Megatron's column and row layers, Transformer Engine's on CUDA).
Sequence parallelism also splits the tokens between those layers over the same ranks. Context parallelism (Ulysses,
arXiv 2309.14509) splits the tokens everywhere and exchanges heads for tokens in attention.

Each parameter carries what the engine must know of it: `tp_shard = (dim, rank, size)` if it is a slice, and
`tp_partial_grad` if it is replicated but each tensor-parallel rank computes only a part of its gradient, because the
rank sees only its own heads (head norms) or its own tokens (what acts on tokens one by one, under sequence
parallelism). Gradients that are partial over context-parallel ranks need no mark: the data-parallel reduction sums
over those ranks too.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    all_to_all,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.attention import joint_attention, permute, varlen_attention
from model.fused import HeadNorm
from model.ops import Ops
from model.packing import Pack
from training.engine.device import Layout

Attention = Callable[[Tensor, Tensor, Tensor, Pack], Tensor]
"""Attention within a pack's segments over q, k, v [L, H, K] in joint order."""
SDPA_ORDER = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip
"""SDPA's kernels on CUDA, the first that can is taken."""
AMPERE, HOPPER = 8, 9
"""Major compute capability of the first devices of these architectures."""


class MegatronOps(Ops):
    """Layers of one rank of `layout`; `dtype` is that of weights and activations.

    Both streams of a pack must be multiples of `align`, which `quantum` divides; every rank then has a multiple of
    `token_multiple` of each (products in fp8 ask for 8 or more). `seen_by_aten` uses only kernels that torch's
    dispatcher sees, as selective recomputation must. Build the model inside `megatron_region()`; its weights are
    uninitialised.
    """

    def __init__(
        self, layout: Layout, dtype: torch.dtype, attention: str = "auto", quantum: int = 16,
        token_multiple: int = 1, seen_by_aten: bool = False,
    ):  # fmt: skip
        self.layout, self.dtype, self.token_multiple = layout, dtype, token_multiple
        self.align = math.lcm(layout.tp_size * layout.cp_size * token_multiple, quantum)
        self.shards = layout.cp_size * (layout.tp_size if layout.sp else 1)
        self.heads_divisor = layout.tp_size * layout.cp_size
        self.config = megatron_config(layout, dtype)
        self.unsplit_config = megatron_config(layout, dtype, sp=False)
        self.column_class, self.row_class = linear_classes(layout, seen_by_aten)
        attention = choose_attention(attention, layout, dtype, seen_by_aten)
        self.varlen_attention = attention_backend(attention, layout.device.type)

    def column(self, in_features: int, out_features: int) -> nn.Module:
        if self.layout.tp_size == 1:
            return self._linear(in_features, out_features)
        return self._parallel(self.column_class, in_features, out_features, self.config, gather_output=False)

    def row(self, in_features: int, out_features: int) -> nn.Module:
        if self.layout.tp_size == 1:
            return self._linear(in_features, out_features)
        row = self._parallel(self.row_class, in_features, out_features, self.config, input_is_parallel=True)
        row.bias.tp_partial_grad = self.layout.sp
        return row

    def replicated(self, in_features: int, out_features: int) -> nn.Module:
        return self._partial(self._linear(in_features, out_features), self.layout.sp)

    def vector(self, in_features: int, out_features: int) -> nn.Module:
        return self._linear(in_features, out_features)

    def modulation(self, in_features: int, out_features: int) -> nn.Module:
        if self.layout.tp_size == 1:
            return self._linear(in_features, out_features)
        layer = ModulationOfOwnTokens if self.layout.sp else Modulation
        return self._parallel(layer, in_features, out_features, self.unsplit_config, gather_output=False)

    def token_norm(self, dim: int, eps: float) -> nn.Module:
        norm = nn.RMSNorm(dim, eps=eps, device=self.layout.device, dtype=self.dtype)
        return self._partial(norm, self.layout.sp)

    def head_norm(self, dim: int, eps: float) -> nn.Module:
        norm = HeadNorm(dim, eps=eps, device=self.layout.device, dtype=self.dtype)
        return self._partial(norm, self.layout.tp_size > 1)

    def shard_tokens(self, x: Tensor) -> Tensor:
        x = self.shard_context(x)
        return _slice(x, self.layout.tp_rank, self.layout.tp_size) if self.layout.sp else x

    def shard_context(self, x: Tensor) -> Tensor:
        return _slice(x, self.layout.cp_rank, self.layout.cp_size)

    def gather_tokens(self, x: Tensor) -> Tensor:
        # Every rank computes the same loss from the result, so each takes its own slice of the gradient back.
        if self.layout.sp:
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=self.layout.tp_group)
        return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=self.layout.cp_group)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
        return joint_attention(q, k, v, pack) if pack.even is not None else self._uneven_attention(q, k, v, pack)

    @torch.compiler.disable  # segment lengths differ from batch to batch; what is before and after compiles once
    def _uneven_attention(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
        cp = self.layout.cp_size
        if cp == 1 and self.varlen_attention is varlen_attention:
            return joint_attention(q, k, v, pack)
        order, inverse = self._order(pack)
        if cp == 1:
            q, k, v = (permute(x, order, inverse) for x in (q, k, v))
            return permute(self.varlen_attention(q, k, v, pack), inverse, order)
        qkv = _exchange_tokens_for_heads(torch.stack((q, k, v), dim=1), cp, self.layout.cp_group)
        q, k, v = permute(qkv, order, inverse).unbind(1)
        heads = permute(self.varlen_attention(q, k, v, pack), inverse, order)
        return _exchange_heads_for_tokens(heads, cp, self.layout.cp_group)

    def _order(self, pack: Pack) -> tuple[Tensor, Tensor]:
        cached = pack.__dict__.get("_rank_major")  # the same for all blocks of a forward pass
        if cached is None:
            cached = pack.__dict__["_rank_major"] = pack.rank_major(self.layout.cp_size)
        return cached

    def _linear(self, in_features: int, out_features: int) -> nn.Linear:
        return nn.Linear(in_features, out_features, device=self.layout.device, dtype=self.dtype)

    def _partial(self, module: nn.Module, partial: bool) -> nn.Module:
        for param in module.parameters():
            param.tp_partial_grad = partial
        return module

    def _parallel(
        self, cls: type, in_features: int, out_features: int, config: TransformerConfig, **kwargs
    ) -> nn.Module:
        module = cls(
            in_features, out_features, config=config, tp_group=self.layout.tp_group, init_method=_no_init,
            bias=True, skip_bias_add=False, is_expert=False, **kwargs,
        )  # fmt: skip
        column = "gather_output" in kwargs
        for name, param in module.named_parameters():
            if column or name == "weight":
                dim = 0 if column else 1
                param.tp_shard = (dim, self.layout.tp_rank, self.layout.tp_size)
                param.tensor_model_parallel, param.partition_dim, param.partition_stride = True, dim, 1
        return module


def _slice(x: Tensor, rank: int, size: int) -> Tensor:
    return x if size == 1 else x.chunk(size)[rank]


def _no_init(weight: Tensor) -> None:
    """`MMDiT.initialize` or a checkpoint fills the weights."""


class _FirstOutput:
    """Megatron's linears return (output, bias); ours return the output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class Column(_FirstOutput, ColumnParallelLinear):
    """[L, in] -> [L, out / tp]; under sequence parallelism it gathers the tokens of all ranks first."""


class Row(_FirstOutput, RowParallelLinear):
    """[L, in / tp] -> [L, out], summed over ranks; under sequence parallelism each keeps its own tokens."""


class Modulation(Column):
    """[S, in] -> [S, out]: sharded weight, whole output, for rows that every rank uses for all tokens.

    All ranks then hold the same whole gradient of the output, and each takes its own slice of it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return gather_from_tensor_model_parallel_region(super().forward(x), group=self.tp_group)


class ModulationOfOwnTokens(Column):
    """The same under sequence parallelism, where each rank modulates only its own tokens.

    The output's gradient is a partial sum on each rank, so the slices are summed over ranks (reduce-scatter).
    """

    def forward(self, x: Tensor) -> Tensor:
        return all_gather_last_dim_from_tensor_parallel_region(super().forward(x), group=self.tp_group)


def megatron_config(layout: Layout, dtype: torch.dtype, sp: bool | None = None) -> TransformerConfig:
    """The settings that Megatron's layers, DDP and optimizer read; the model's shape is none of their business."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=layout.tp_size * layout.cp_size,
        num_attention_heads=layout.tp_size * layout.cp_size,
        tensor_model_parallel_size=layout.tp_size,
        context_parallel_size=layout.cp_size,
        sequence_parallel=layout.sp if sp is None else sp,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,  # gradients are summed over ranks, not averaged
    )


def linear_classes(layout: Layout, seen_by_aten: bool = False) -> tuple[type, type]:
    """(column, row) of tensor-parallel ranks: Transformer Engine's on CUDA if it is installed, else Megatron's own.

    Without Transformer Engine its classes can be imported all the same, as mocks: Megatron says which they are.
    """
    if layout.device.type != "cuda" or layout.tp_size == 1 or seen_by_aten or not transformer_engine.HAVE_TE:
        return Column, Row
    return type("TEColumn", (_FirstOutput, transformer_engine.TEColumnParallelLinear), {}), type(
        "TERow", (_FirstOutput, transformer_engine.TERowParallelLinear), {}
    )


def choose_attention(name: str, layout: Layout, dtype: torch.dtype, seen_by_aten: bool = False) -> str:
    """The backend that "auto" stands for; others stand for themselves.

    On Hopper and later Transformer Engine's `thd` kernels, which run on cuDNN, or else SDPA, which takes cuDNN first;
    before that torch's flash kernel, for there `thd` falls back to a product of all tokens with all. ValueError for
    Transformer Engine where `seen_by_aten` is asked for.
    """
    if name == "te" and seen_by_aten:
        raise ValueError(
            "selective recomputation does not see Transformer Engine's attention, and would run it twice: "
            "take --recompute block, or --attention auto, sdpa or flash"
        )
    if name != "auto":
        return name
    if layout.device.type != "cuda" or dtype != torch.bfloat16:
        return "sdpa"
    major, _ = torch.cuda.get_device_capability(layout.device)
    if major >= HOPPER:
        return "te" if transformer_engine.HAVE_TE and not seen_by_aten else "sdpa"
    return "flash" if major >= AMPERE else "sdpa"


def attention_backend(name: str, device_type: str) -> Attention:
    """Attention over the segments of a pack by SDPA, torch's flash kernel, or Transformer Engine (`thd`)."""
    if name == "sdpa":
        return _cudnn_first if device_type == "cuda" else varlen_attention
    if name == "flash":
        from torch.nn.attention.varlen import varlen_attn

        return lambda q, k, v, pack: varlen_attn(
            q, k, v, pack.cu_seqlens, pack.cu_seqlens, max(pack.segment_lengths), max(pack.segment_lengths)
        )
    from transformer_engine.pytorch import DotProductAttention

    @cache
    def core(heads: int, dim: int) -> nn.Module:
        # Ulysses has exchanged tokens for heads already: no context parallelism of Transformer Engine's own here.
        return DotProductAttention(heads, dim, attn_mask_type="padding", qkv_format="thd", attention_dropout=0.0)

    def attend(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
        seqlens, longest = pack.cu_seqlens, max(pack.segment_lengths)
        out = core(*q.shape[1:])(
            q, k, v, cu_seqlens_q=seqlens, cu_seqlens_kv=seqlens, max_seqlen_q=longest, max_seqlen_kv=longest
        )
        return out.view_as(q)

    return attend


def _cudnn_first(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
    with sdpa_kernel(SDPA_ORDER, set_priority=True):
        return varlen_attention(q, k, v, pack)


def _exchange_tokens_for_heads(x: Tensor, cp: int, group) -> Tensor:
    """[L / cp, 3, H, K] of this rank's tokens -> [L, 3, H / cp, K] of its heads, tokens in rank-major order."""
    tokens, three, heads, dim = x.shape
    x = x.reshape(tokens, three, cp, heads // cp, dim).permute(2, 0, 1, 3, 4).contiguous()
    return all_to_all(group, x).reshape(cp * tokens, three, heads // cp, dim)


def _exchange_heads_for_tokens(x: Tensor, cp: int, group) -> Tensor:
    """[L, H / cp, K] -> [L / cp, H, K]; the inverse."""
    tokens, heads, dim = x.shape
    x = all_to_all(group, x.reshape(cp, tokens // cp, heads, dim))
    return x.permute(1, 0, 2, 3).reshape(tokens // cp, cp * heads, dim)
