"""How the blocks of a model are run: compiled or not, with activations kept, recomputed, or recomputed where cheap."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

VARIANTS = 32
"""Largest number of times that one function is compiled; torch allows 8.

A block's forward is one function for all blocks: with and without gradient, of the policy and of a frozen one, last or
not, for one sample and for several, for fixed and for any lengths."""

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
            block.forward = Compiled(block.forward)
        if recompute != "none":
            contexts = {"context_fn": _selective} if recompute == "selective" else {}
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **contexts
            )


class Compiled:
    """A compiled function, which says so if it has been compiled too often, and is run as it is from then on."""

    said = False

    def __init__(self, function: Callable[..., Any]):
        self._function, self._compiled = function, torch.compile(function)

    def __call__(self, *args: Any) -> Any:
        try:
            # here, since settings are a thread's own, and CUDA's recomputation runs in one of autograd's
            with torch._dynamo.config.patch(recompile_limit=VARIANTS, fail_on_recompile_limit_hit=True):
                return self._compiled(*args)
        except FailOnRecompileLimitHit:
            if not Compiled.said:
                print(f"blocks met more than {VARIANTS} kinds of input: new kinds run uncompiled", file=sys.stderr)
                Compiled.said = True
            return self._function(*args)


def _selective():
    return create_selective_checkpoint_contexts(_policy)


def _policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
    kept = operator.name().partition(".")[0] in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
