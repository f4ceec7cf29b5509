"""The curriculum as data: 256 -> 640 -> 1328 pixels (Qwen-Image report, section 3.3). Imports no torch.

The report gives the resolutions, the logit-normal density of noise levels, Adam with betas (.9, .95) and four-way
tensor parallelism; batch sizes, lengths and learning rates of the 20B preset are ours. The toy recipes train the tiny
preset on a CPU, on the demo's pictures, at resolutions that rise more slowly.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from command_line import UserError, flag
from model.config import PRESETS, MMDiTConfig
from training.data_config import DataConfig
from training.demo_data import demo_data
from training.engine.config import EngineConfig, OptimizerConfig, ParallelConfig
from training.loop import LoopConfig
from training.source import BASE, TOY_SIDE_PX, look, preset_of


@dataclass(frozen=True)
class StageConfig(DataConfig):
    """One stage of the curriculum."""

    res: Literal[256, 640, 1328] = 256
    """Stage: pictures have about the area of a square with this side, in pixels (64, 96, 128 for the tiny preset)."""
    preset: Literal["tiny", "small", "qwen-image"] = "qwen-image"
    """Size of the model. Default: that of --init, else the one that takes the text states of --data, else tiny."""
    data: tuple[Path, ...] = ()
    """Encoded data sets (of data_pipeline/produce.py), or a single one that is still being made. Default: the demo's,
    made if it is missing."""
    init: Path | None = None
    """Start from the averaged weights of this run, or from this diffusers folder or hub id. Default: at random."""
    components: Path | None = None
    """Folder with the VAE that draws samples; noted in the run for sampling and export later."""
    batch_size: int = 1024
    """Samples in a step, over all ranks."""
    max_tokens: int = 8192
    """Tokens, of text and image, in a microbatch."""
    density: Literal["logit-normal", "uniform", "mode"] = "logit-normal"
    """Density of noise levels."""
    density_mean: float = 0.0
    """Of the logit-normal density before the shift by resolution: above 0 for more noise."""
    density_std: float = 1.0
    """Of the same: below 1 for fewer extremes."""
    held_out: int | None = None
    """Samples of --data that are not trained on: with each validation the loss on them is logged, at fixed draws.
    Default: a fiftieth, 512 at most; none of data that are still being made, or of --shares."""
    sample_every: int = 1000
    """Steps between pictures in samples/, which need --components."""
    validate_every: int = 5000
    """Steps between validations, which need a text encoder in --components. 0 for none."""

    NAME: ClassVar = "pretrain"
    MEASURES_FIRST: ClassVar = False
    HELD_OUT_SHARE: ClassVar = 1 / 50

    @classmethod
    def defaults(cls, argv: list[str]) -> "StageConfig":
        res = flag(argv, "--res") or "256"
        return recipe(int(res) if res.isdigit() else 256, flag(argv, "--preset") or likely_preset(argv))

    def completed(self) -> "StageConfig":
        config = replace(self, out=self.out or Path(f"runs/pretrain-{self.res}"))
        config.require_sources()
        if (self.density_mean, self.density_std) != (0.0, 1.0) and self.density != "logit-normal":
            raise UserError(f"--density-mean and --density-std are of the logit-normal density, not of {self.density}")
        if self.density_std <= 0:
            raise UserError(f"--density-std {self.density_std}: a spread is above 0")
        for path in (*(config.data if config.raw is None else ()), config.components):
            if path is not None and not path.exists():
                raise UserError(f"{path} does not exist")
        if config.data or config.dry_run:
            return config
        if config.preset != "tiny":
            raise UserError(f"preset {config.preset} needs --data: encoded shards of data_pipeline/produce.py")
        return replace(config, data=(demo_data(config.side_px()),), components=config.components or BASE)

    @property
    def model(self) -> MMDiTConfig:
        return PRESETS[self.preset]

    def side_px(self) -> int:
        return TOY_SIDE_PX[self.res] if self.preset == "tiny" else self.res

    def summary(self) -> str:
        start = "random weights" if self.init is None else self.init
        return (
            f"{self.preset} MMDiT ({self.model.num_parameters:,} parameters) from {start}, stage {self.res} at "
            f"{self.side_px()} px, data {', '.join(map(str, self.data))} -> {self.out}"
        )


_LARGE = EngineConfig(parallel=ParallelConfig(tp=4, sp=True), optimizer=OptimizerConfig(warmup_steps=2000))
_TOY = EngineConfig(optimizer=OptimizerConfig(lr=1e-3, warmup_steps=20), ema_decay=0.995)

STAGES: dict[int, StageConfig] = {
    256: StageConfig(res=256, batch_size=4096, engine=_LARGE, loop=LoopConfig(500_000, save_every=2000)),
    640: StageConfig(res=640, batch_size=2048, engine=_LARGE, loop=LoopConfig(200_000, save_every=1000)),
    1328: StageConfig(res=1328, batch_size=1024, engine=_LARGE, loop=LoopConfig(100_000, save_every=500)),
}
TOYS: dict[int, StageConfig] = {
    res: replace(
        stage, preset="tiny", batch_size=32, max_tokens=4096, sample_every=100, validate_every=100, engine=_TOY,
        loop=LoopConfig(200, save_every=50), validation="evaluation.validation:ShapesValidation",
    )
    for res, stage in STAGES.items()
}  # fmt: skip


def recipe(res: int, preset: str = "tiny") -> StageConfig:
    """The recipe of a stage for a preset. ValueError for an unknown stage."""
    if res not in STAGES:
        raise ValueError(f"there is no stage {res}; stages are {', '.join(map(str, STAGES))}")
    if preset == "tiny":
        return TOYS[res]
    if preset == "small":
        one_gpu = replace(_LARGE, parallel=ParallelConfig())
        return replace(STAGES[res], preset="small", batch_size=256, engine=one_gpu)
    return STAGES[res]


def likely_preset(argv: list[str]) -> str:
    """The preset of --init; without one, the first that takes the text states of --data; tiny without either."""
    if init := flag(argv, "--init"):
        found = look(init)
        if found.kind == "hub":
            return "qwen-image"
        if (preset := preset_of(found.model_config())) is None:
            raise UserError(f"{init} is of no preset ({', '.join(PRESETS)}); pretraining takes the presets' models")
        return preset
    width = None if (data := flag(argv, "--data")) is None else _text_width(Path(data))
    if width is None and flag(argv, "--raw") and (components := flag(argv, "--components")):
        width = _encoder_width(Path(components) / "text_encoder" / "config.json")
    if width is None or width == PRESETS["tiny"].joint_attention_dim:
        return "tiny"
    return "qwen-image"


def _encoder_width(config: Path) -> int | None:
    """Width of a Qwen2.5-VL's hidden states; None if there is none."""
    try:
        return json.loads(config.read_text())["text_config"]["hidden_size"]
    except (OSError, ValueError, KeyError):
        return None


def _text_width(data: Path) -> int | None:
    """Width of an encoded data set's text states; None if it is none."""
    from safetensors import safe_open

    file = data / "empty.safetensors"
    if not file.is_file():
        return None
    with safe_open(file, framework="numpy") as tensors:
        return tensors.get_slice("txt").get_shape()[-1]
