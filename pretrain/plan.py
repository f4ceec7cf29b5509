"""What a stage will cost: parameters, tokens, FLOPs, memory. Imports no torch."""

import os
from typing import Protocol

from model.config import MMDiTConfig
from training.engine.config import EngineConfig
from training.loop import LoopConfig

TXT_TOKENS = {"tiny": 24, "small": 256, "qwen-image": 256}
"""Assumed length of a prompt."""

ACTIVATION_BYTES = {2: 54, 4: 92}
"""Bytes that autograd keeps, at most, per token, layer and channel of the residual stream, by an activation's size."""


class Planned(Protocol):
    """What of a stage's config decides its cost."""

    res: int
    preset: str
    batch_size: int
    max_tokens: int
    engine: EngineConfig
    loop: LoopConfig
    model: MMDiTConfig

    def side_px(self) -> int: ...


def plan(config: Planned) -> str:
    """The lines that `--dry-run` prints. ValueError if the processes do not divide into the layout."""
    model, engine, parallel = config.model, config.engine, config.engine.parallel
    sp = parallel.sp and parallel.tp > 1
    world, shards = int(os.environ.get("WORLD_SIZE", 1)), parallel.tp * parallel.cp
    if world % shards and world > 1:
        raise ValueError(f"{world} processes do not divide over tp {parallel.tp} x cp {parallel.cp}")
    world = max(world, shards)
    dp = world // shards

    img, txt = (config.side_px() // 16) ** 2, TXT_TOKENS[config.preset]
    forward = model.forward_flops(img, txt, config.batch_size)
    flops = forward * (4 if engine.recompute == "block" else 3)

    parameters, gib = model.num_parameters, 2**30
    bf16 = engine.dtype == "bfloat16" or (engine.dtype == "auto" and config.preset != "tiny")
    size, here = (2 if bf16 else 4), parameters / parallel.tp
    tokens = min(config.max_tokens, -(-config.batch_size // dp) * (img + txt)) / (
        parallel.cp * (parallel.tp if sp else 1)
    )
    layers = 1 if engine.recompute == "block" else model.num_layers
    kept = tokens * model.width * size * (model.num_layers * (engine.recompute == "block") * 2)
    memory = {
        "weights": size * here,
        "gradients": 4 * here,
        "optimizer (master, moments)": (12 if bf16 else 8) * here / (dp * parallel.cp),
        "moving average": 4 * here / (dp * parallel.cp),
        "activations, about": kept + tokens * model.width * layers * ACTIVATION_BYTES[size],
    }
    total = sum(memory.values()) / gib
    return "\n".join(
        [
            f"stage {config.res}: {config.preset}, {parameters:,} parameters, {config.loop.steps:,} steps of "
            f"{config.batch_size:,} samples of {img} image + about {txt} text tokens ({config.side_px()} px squares)",
            f"layout: {world} processes = tp {parallel.tp}{' with sp' if sp else ''} x cp {parallel.cp} x dp {dp}",
            f"a step: {config.batch_size * (img + txt):,} tokens, {flops:.3g} FLOPs ({flops / world:.3g} a process); "
            f"the stage: {flops * config.loop.steps:.3g} FLOPs",
            f"memory a process: {total:.2f} GiB = "
            + " + ".join(f"{value / gib:.2f} {name}" for name, value in memory.items()),
        ]
    )
