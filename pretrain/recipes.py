"""The curriculum as data: 256 -> 640 -> 1328 pixels (Qwen-Image report, section 3.3). Imports no torch.

The report gives the resolutions, the logit-normal density of noise levels, Adam with betas (.9, .95) and four-way
tensor parallelism; batch sizes, lengths and learning rates of the 20B preset are ours. The toy recipes train the tiny
preset on a CPU, on the demo's pictures, at resolutions whose ratios are about the same.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from model.config import PRESETS, MMDiTConfig
from training.demo_data import STEPS, TOY_SIDE_PX
from training.engine.config import EngineConfig, OptimizerConfig, ParallelConfig, has_gpu
from training.loop import LoopConfig


@dataclass(frozen=True)
class StageConfig:
    """One stage of the curriculum."""

    res: Literal[256, 640, 1328] = 256
    """Stage: pictures have about the area of a square with this side, in pixels (64, 96, 128 for the tiny preset)."""
    preset: Literal["tiny", "small", "qwen-image"] = "qwen-image"
    """Size of the model. Default: qwen-image with a GPU, tiny without."""
    data: tuple[Path, ...] = ()
    """Encoded data sets (of data_pipeline/produce.py). Default: the demo's, made if it is missing."""
    init: Path | None = None
    """Start from the averaged weights of this run, or from this diffusers folder or hub id. Default: at random."""
    components: Path | None = None
    """Folder with the VAE that draws samples; noted in the run for sampling and export later."""
    out: Path | None = None
    """Folder of the run. Default: runs/pretrain-RES."""
    batch_size: int = 1024
    """Samples in a step, over all ranks."""
    max_tokens: int = 8192
    """Tokens, of text and image, in a microbatch."""
    density: Literal["logit-normal", "uniform", "mode"] = "logit-normal"
    """Density of noise levels."""
    condition_dropout: float = 0.1
    """Probability that a sample trains with the empty prompt, for guidance."""
    sample_every: int = 1000
    """Steps between pictures in samples/, which need --components."""
    validate_every: int = 5000
    """Steps between validations: frozen prompts of the shapes world are drawn and judged. They need a text encoder in
    --components. 0 for none."""
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = field(default_factory=LoopConfig)
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)
    dry_run: bool = False
    """Print the plan: parameters, FLOPs, tokens, memory per GPU."""

    @property
    def model(self) -> MMDiTConfig:
        return PRESETS[self.preset]

    @property
    def side_px(self) -> int:
        """Side of the square that pictures have the area of."""
        return TOY_SIDE_PX[self.res] if self.preset == "tiny" else self.res


_LARGE = EngineConfig(parallel=ParallelConfig(tp=4, sp=True), optimizer=OptimizerConfig(warmup_steps=2000))
_TOY = EngineConfig(optimizer=OptimizerConfig(lr=1e-3, warmup_steps=20), ema_decay=0.995)

STAGES: dict[int, StageConfig] = {
    256: StageConfig(256, batch_size=4096, engine=_LARGE, loop=LoopConfig(500_000, save_every=2000)),
    640: StageConfig(640, batch_size=2048, engine=_LARGE, loop=LoopConfig(200_000, save_every=1000)),
    1328: StageConfig(1328, batch_size=1024, engine=_LARGE, loop=LoopConfig(100_000, save_every=500)),
}
TOYS: dict[int, StageConfig] = {
    res: replace(
        stage, preset="tiny", batch_size=32, max_tokens=4096, sample_every=100, validate_every=100, engine=_TOY,
        loop=LoopConfig(STEPS, save_every=50),
    )
    for res, stage in STAGES.items()
}  # fmt: skip


def recipe(res: int, preset: str | None = None) -> StageConfig:
    """The recipe of a stage for a preset, by default what this machine can run. ValueError for an unknown stage."""
    if res not in STAGES:
        raise ValueError(f"there is no stage {res}; stages are {', '.join(map(str, STAGES))}")
    preset = preset or ("qwen-image" if has_gpu() else "tiny")
    if preset == "tiny":
        return TOYS[res]
    if preset == "small":
        one_gpu = replace(_LARGE, parallel=ParallelConfig())
        return replace(STAGES[res], preset="small", batch_size=256, engine=one_gpu)
    return STAGES[res]
