"""Settings of the engine. Imports no torch: `--help` reads it."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from model.config import LoRAConfig


@dataclass(frozen=True)
class ParallelConfig:
    """How one model is spread over processes; what is left of the world is data parallel.

    Raises ValueError for sizes that cannot be.
    """

    tp: int = 1
    """Tensor-parallel size: every layer's heads are split over so many ranks."""
    cp: int = 1
    """Context-parallel size (Ulysses): tokens are split, heads are exchanged in attention."""
    sp: bool = False
    """Split the tokens between the tensor-parallel regions too (sequence parallelism); does nothing with tp 1."""

    def __post_init__(self):
        if self.tp < 1 or self.cp < 1:
            raise ValueError(f"tensor- and context-parallel sizes must be positive, got tp {self.tp}, cp {self.cp}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay (none on biases and norms), Muon beside it, and the learning-rate schedule."""

    lr: float = 1e-4
    muon_lr: float | None = None
    """Learning rate of Muon for the matrices of the blocks, modulation aside; AdamW takes the rest. Default: AdamW for
    all."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest norm of the gradient of all parameters."""
    warmup_steps: int = 100
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """After the warm-up; wsd stays constant and falls as 1 - sqrt over the last `decay_share` of the run (warm-up,
    stable, decay: arXiv 2404.06395, 2405.18392)."""
    decay_share: float = 0.2
    """Schedule wsd: the part of the run in which the learning rate falls."""
    final_lr_ratio: float = 0.1
    """Schedules cosine and wsd: where the learning rate ends, as a fraction of `lr`."""
    width_base: int | None = None
    """Width of the model that `lr` was tuned at, for one of another width: AdamW's rates of matrices with more inputs
    in a wider model go as 1 / width (muP, arXiv 2203.03466). Default: `lr` for all."""

    def __post_init__(self):
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"a learning rate falls over a share of the run above 0, up to 1, not {self.decay_share}")
        if self.width_base is not None and self.width_base < 1:
            raise ValueError(f"a width is positive, got width_base {self.width_base}")

    def learning_rate(self, step: int, total_steps: int) -> float:
        """Learning rate of update `step`, counted from 0; Muon's follows it in proportion."""
        from math import cos, pi

        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "wsd":
            begin = max(self.warmup_steps, round((1 - self.decay_share) * total_steps))
            done = min(1.0, max(0, step - begin) / max(1, total_steps - begin))
            return self.lr * (1 - (1 - self.final_lr_ratio) * done**0.5)
        done = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        return self.lr * (self.final_lr_ratio + (1 - self.final_lr_ratio) * 0.5 * (1 + cos(pi * done)))


def fast_dtype() -> Literal["float32", "bfloat16"]:
    """bfloat16 on a CPU that multiplies it in hardware (AMX, or AVX-512 with bf16), else float32."""
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text().split() if cpu.exists() else []
    return "bfloat16" if {"amx_bf16", "avx512_bf16"} & set(flags) else "float32"


@dataclass(frozen=True)
class EngineConfig:
    """Everything about how steps are run; what is learnt from what is the objective's and the loader's business."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and activations; auto is bfloat16 on CUDA (masters, moments and reductions stay fp32), else float32."""
    ema_decay: float = 0.999
    """Decay of the weights' moving average; it ramps up as (1 + n) / (10 + n)."""
    average_on_host: bool = False
    """Keep moving averages in the host's memory: a GPU has 4 bytes a weight more, a step takes longer."""
    attention: Literal["auto", "sdpa", "flash", "te"] = "auto"
    """auto: on Hopper and later Transformer Engine if installed, else SDPA on cuDNN; on Ampere torch's flash kernel;
    elsewhere SDPA."""
    compile: Annotated[bool | None, tyro.conf.arg(constructor=bool)] = None
    """torch.compile every block. Default: on CUDA, unless recomputation is selective."""
    recompute: Literal["none", "selective", "block"] = "none"
    """Recompute each block's activations in the backward pass instead of keeping them: selective keeps the results of
    matrix products and attention, and recomputes norms, modulation, rotation and GELU; block recomputes all."""
    quantize: Literal["none", "nf4", "int8", "fp8"] = "none"
    """Store the frozen weights of the blocks under adapters in fewer bits: nf4 in four (bitsandbytes), int8 and fp8 in
    eight (torchao). Needs --tp 1."""
    swap_blocks: int = 0
    """So many blocks keep their quantised weights in host memory; two of them at a time are on the device."""

    lora_rank: int = 0
    """Train adapters of this rank beside the weights, which stay as they are (LoRA). 0 trains the weights."""
    lora_alpha: float | None = None
    """What the adapters' sum counts, times the rank. Default: twice the rank."""
    lora_targets: tuple[str, ...] = ("q", "k", "v", "out")
    """Layers with an adapter, by the end of their name: q (of both streams), img.mlp_in, mod, blocks.0.txt.k."""
    lora_rank_stabilised: bool = False
    """Scale adapters by alpha / sqrt(rank) in place of alpha / rank."""

    @property
    def lora(self) -> LoRAConfig | None:
        """The adapters that train; None if the weights do."""
        if not self.lora_rank:
            return None
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return LoRAConfig(self.lora_rank, alpha, self.lora_rank_stabilised, self.lora_targets)

    def with_lora(self, lora: LoRAConfig) -> "EngineConfig":
        """The same, training adapters."""
        return replace(
            self, lora_rank=lora.rank, lora_alpha=lora.alpha, lora_targets=lora.targets,
            lora_rank_stabilised=lora.rank_stabilised,
        )  # fmt: skip

    def __post_init__(self):
        if self.lora_rank < 0:
            raise ValueError(f"the rank of adapters is positive, or 0 for none, got {self.lora_rank}")
        if self.lora_rank and self.optimizer.width_base is not None:
            raise ValueError("the rates of adapters do not follow the width: leave --width-base out")
        if self.swap_blocks < 0 or (self.swap_blocks and self.quantize == "none"):
            raise ValueError("blocks are swapped with a frozen base only: give --swap-blocks N with --quantize")
        if self.compile and self.recompute == "selective":
            raise ValueError("compiled blocks recompute what is cheap anyway: use recompute none or block with compile")

    def compiles(self, device_type: str) -> bool:
        """Whether blocks are compiled for a device; unless told, those of plain layers are, on CUDA."""
        plain = self.recompute != "selective" and self.quantize == "none"
        return device_type == "cuda" and plain if self.compile is None else self.compile
