"""How the blocks of a model are run: compiled or not, with activations kept, recomputed, or recomputed where cheap."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_KEPT = {
    f"aten::{name}"
    for name in (
        "mm", "addmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    )
} | {"torch_attn::_varlen_attn", "bitsandbytes::gemm_4bit"}  # fmt: skip
"""Operators whose results selective recomputation keeps: the expensive ones."""


def prepare_blocks(model: nn.Module, compiled: bool, recompute: str) -> None:
    """Replace the forward of each of `model.blocks`, if it has any, as `EngineConfig.compile` and `recompute` say.

    Gradients do not change. Recomputation wraps compilation: what is compiled is a whole forward in either case.
    """
    for block in getattr(model, "blocks", ()):
        if compiled:
            block.forward = torch.compile(block.forward)
        if recompute != "none":
            contexts = {"context_fn": _selective} if recompute == "selective" else {}
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **contexts
            )


def _selective():
    return create_selective_checkpoint_contexts(_policy)


def _policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
    kept = operator.name().partition(".")[0] in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
