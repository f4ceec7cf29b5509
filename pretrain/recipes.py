"""The curriculum as data: 256 -> 640 -> 1328 pixels (Qwen-Image report, section 3.3). Imports no torch.

A stage is a `StageConfig`; what it draws, and how that moves, is its `draws`. Of the 20B preset the report gives the
resolutions, the order of the progressions (text from none to paragraphs, filters that tighten, balanced domains, drawn
pictures beside real ones), the domains' shares (section 3.1: nature 55, design 27, people 13, synthetic text 5 %), the
logit-normal density of noise levels, Adam with betas (.9, .95) and four-way tensor parallelism. All other numbers are
ours: batches, lengths, learning rates, half-lives, thresholds, when shares move. The toy recipes train the tiny preset
on a CPU, on the demo's pictures, at resolutions that rise more slowly.
"""

import json
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro

from command_line import UserError, flag, from_dict
from data_pipeline.draws import Curve, Draws
from model.config import PRESETS, MMDiTConfig
from pretrain.before import RESOLUTIONS, default_place, described, start_of
from pretrain.mixing import mean_sample, tokens_and_flops
from training.cost.step import Work
from training.data_config import DataConfig
from training.demo_data import demo_data
from training.engine.config import EngineConfig, OptimizerConfig, ParallelConfig
from training.loop import LoopConfig
from training.source import AT_RANDOM, BASE, TOY_SIDE_PX, look, preset_of
from training.start import TOY_VALIDATION

TOY_PRESETS = ("tiny", "mini")
"""For pictures of toy size and the text encoder that is shipped: width 192, and 384."""


@dataclass(frozen=True)
class StageConfig(DataConfig):
    """One stage of the curriculum."""

    res: Literal[256, 640, 1328] = 256
    """Stage: pictures have about the area of a square with this side, in pixels (64, 96, 128 for tiny and mini)."""
    preset: Literal["tiny", "mini", "small", "qwen-image"] = "qwen-image"
    """Size of the model. Default: that of --init, else the one that takes the text states of --data, else tiny."""
    data: tuple[Path, ...] = ()
    """Encoded data sets (of data_pipeline/produce.py), or a single one that is still being made. Default: the demo's,
    made if it is missing."""
    init: Path | None = None
    """Start from the averaged weights of this run, or from this diffusers folder or hub id; or at random (random).
    Default: the finished run of the stage before; of the first stage, random."""
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
    shift: float | None = None
    """Factor by which noise levels are shifted towards 1. Default: the schedule's, which depends on the resolution."""
    ema_half_life: float | None = None
    """Images after which a weight counts half in the moving average, in place of --ema-decay."""
    draws: tyro.conf.Suppress[Draws] = field(default_factory=Draws)
    rope: tyro.conf.Suppress[Literal["msrope", "text-first", "scaling"]] = "msrope"
    natural: bool = False
    """Draw every sample as often as any other, whatever shares and least scores the recipe has."""
    held_out: int | None = None
    """Samples of --data that are not trained on: with each validation the loss on them is logged, at fixed draws.
    Default: a fiftieth, 512 at most; none of data that are still being made, or of --shares."""
    sample_every: int = 1000
    """Steps between pictures in samples/, which need --components. 0 for none."""
    validate_every: int = 5000
    """Steps between validations, which need a text encoder in --components. 0 for none."""

    NAME: ClassVar = "pretrain"
    MEASURES_FIRST: ClassVar = False
    HELD_OUT_SHARE: ClassVar = 1 / 50

    @classmethod
    def defaults(cls, argv: list[str]) -> "StageConfig":
        res = flag(argv, "--res") or "256"
        found = recipe(int(res) if res.isdigit() else 256, flag(argv, "--preset") or likely_preset(argv))
        return found if flag(argv, "--ema-decay") is None else replace(found, ema_half_life=None)

    def completed(self) -> "StageConfig":
        config = replace(self, out=self.out or default_place(self.res))
        config.require_sources()
        config = config.completed_draws().with_average()
        if (self.density_mean, self.density_std) != (0.0, 1.0) and self.density != "logit-normal":
            raise UserError(f"--density-mean and --density-std are of the logit-normal density, not of {self.density}")
        if self.density_std <= 0:
            raise UserError(f"--density-std {self.density_std}: a spread is above 0")
        if self.shift is not None and self.shift <= 0:
            raise UserError(f"--shift {self.shift}: a factor is above 0")
        for path in (*(config.data if config.raw is None else ()), config.components):
            if path is not None and not path.exists():
                raise UserError(f"{path} does not exist")
        config = replace(config, init=start_of(config.res, config.out, config.init, may_wait=config.dry_run))
        if config.data or config.dry_run:
            return config
        if config.preset not in TOY_PRESETS:
            raise UserError(f"preset {config.preset} needs --data: encoded shards of data_pipeline/produce.py")
        data = tuple(demo_data(side) for side in config.sides_px())
        return replace(config, data=data, components=config.components or BASE)

    def completed_draws(self) -> "StageConfig":
        """The same with the draws that are to be made: none with --natural or --shares, the demo's from its data."""
        if self.shares or self.natural:
            return replace(self, draws=Draws())
        if not self.data and self.preset in TOY_PRESETS:
            return replace(self, draws=self.draws or DEMO_DRAWS[self.res])
        return self

    def with_average(self) -> "StageConfig":
        """The same with the decay of the moving average that has its half-life."""
        if self.ema_half_life is None:
            return self
        if self.ema_half_life <= 0:
            raise UserError(f"--ema-half-life {self.ema_half_life:g}: a number of images is above 0")
        decay = 0.5 ** (self.samples_a_step() / self.ema_half_life)
        return replace(self, engine=replace(self.engine, ema_decay=decay))

    @property
    def model(self) -> MMDiTConfig:
        return replace(PRESETS[self.preset], rope=self.rope)

    def side_px(self) -> int:
        return side_of(self.res, self.preset)

    def sides_px(self) -> dict[int, Curve]:
        """Sides of the squares whose area pictures have, each with the share of compute that it gets."""
        shares = self.draws.resolutions or {str(self.res): ((0.0, 1.0),)}
        if unknown := set(shares) - set(map(str, RESOLUTIONS)):
            known = ", ".join(map(str, RESOLUTIONS))
            raise UserError(f"draws.resolutions: there is no stage {min(unknown)}; stages are {known}")
        return {side_of(int(res), self.preset): share for res, share in shares.items()}

    def samples_a_step(self) -> float:
        """Samples in a step; of a batch in tokens, as many as prompts of the assumed length make it."""
        if self.batch_tokens is None:
            return self.batch_size
        return self.batch_tokens / mean_sample(self.sides_px(), self.model)[0]

    def work(self) -> Work:
        """Samples count as ones of the stage's own resolution, also those of others that it draws."""
        sides, work = self.sides_px(), super().work()
        if set(sides) == {self.side_px()}:
            return work
        mean, own = mean_sample(sides, self.model)[1], tokens_and_flops(self.side_px(), self.model)[1]
        return replace(work, samples=max(1, round(self.samples_a_step() * mean / own)), unit="samples' worth")

    def summary(self) -> str:
        sides = " and ".join(map(str, self.sides_px()))
        return (
            f"{self.preset} MMDiT ({self.model.num_parameters:,} parameters) from {described(self.init)}, stage "
            f"{self.res} at {sides} px, data {', '.join(map(str, self.data))} -> {self.out}"
        )

    def plan(self) -> str:
        return "\n".join([super().plan(), *textwrap.wrap(f"draws     {self.draws}", 116, subsequent_indent=" " * 10)])


def side_of(res: int, preset: str) -> int:
    """Side, in pixels, of the square whose area pictures of a stage have."""
    return TOY_SIDE_PX[res] if preset in TOY_PRESETS else res


def _large(lr: float) -> EngineConfig:
    return EngineConfig(ParallelConfig(tp=4, sp=True), OptimizerConfig(lr=lr, warmup_steps=2000))


_TOY = EngineConfig(optimizer=OptimizerConfig(lr=1e-3, warmup_steps=20), ema_decay=0.995)
_REAL = {"nature": 0.55, "design": 0.27, "people": 0.13}

STAGES: dict[int, StageConfig] = {
    256: StageConfig(
        res=256, batch_size=4096, engine=_large(1e-4), loop=LoopConfig(500_000, save_every=2000), ema_half_life=2e7,
        draws=Draws(
            text={"none": [[0, 1], [0.3, 1], [1, 0.97]], "words": [[0, 0], [0.3, 0], [0.6, 0.03], [1, 0.02]],
                  "sentences": [[0, 0], [0.6, 0], [1, 0.01]]},
            source={"real": [[0, 0.98], [0.3, 0.98], [1, 0.95]], "synthetic": [[0, 0.02], [0.3, 0.02], [1, 0.05]]},
            domain=_REAL, minimum={"aesthetics": 4.5, "clip": [[0, 0.2], [1, 0.22]]},
        ),
    ),
    640: StageConfig(
        res=640, batch_size=2048, engine=_large(5e-5), loop=LoopConfig(200_000, save_every=1000), ema_half_life=1e7,
        draws=Draws(
            text={"none": 0.96, "words": [[0, 0.02], [1, 0.015]], "sentences": [[0, 0.02], [1, 0.015]],
                  "paragraphs": [[0, 0], [1, 0.01]]},
            source={"real": 0.95, "synthetic": 0.05},
            domain=_REAL, minimum={"aesthetics": [[0, 4.5], [1, 5]], "clip": 0.22},
        ),
    ),
    1328: StageConfig(
        res=1328, batch_size=1024, engine=_large(2e-5), loop=LoopConfig(100_000, save_every=500), ema_half_life=5e6,
        draws=Draws(
            text={"none": 0.96, "words": 0.01, "sentences": 0.015, "paragraphs": 0.015},
            source={"real": 0.95, "synthetic": 0.05},
            domain=_REAL, minimum={"aesthetics": [[0, 5], [1, 5.5]], "clip": 0.22},
        ),
    ),
}  # fmt: skip
TOYS: dict[int, StageConfig] = {
    res: replace(
        stage, preset="tiny", batch_size=32, max_tokens=4096, sample_every=100, validate_every=100, engine=_TOY,
        loop=LoopConfig(200, save_every=50), validation=TOY_VALIDATION, ema_half_life=None,
        draws=Draws(),
    )
    for res, stage in STAGES.items()
}  # fmt: skip
DEMO_DRAWS = {
    256: Draws(text={"none": [[0, 1], [0.5, 0.8], [1, 0.6]], "words": [[0, 0], [0.5, 0.2], [1, 0.4]]}),
    640: Draws(text={"none": 0.6, "words": 0.4}),
    1328: Draws(resolutions={"640": [[0, 1], [0.5, 0]], "1328": [[0, 0], [0.5, 1]]}, text={"none": 0.6, "words": 0.4}),
}
"""What the toys draw from the demo's pictures, where no data are given."""


def recipe(res: int, preset: str = "tiny") -> StageConfig:
    """The recipe of a stage for a preset. ValueError for an unknown stage."""
    if res not in STAGES:
        raise ValueError(f"there is no stage {res}; stages are {', '.join(map(str, STAGES))}")
    if preset in TOY_PRESETS:
        return replace(TOYS[res], preset=preset)
    if preset == "small":
        one_gpu = replace(STAGES[res].engine, parallel=ParallelConfig())
        small = dict(preset="small", batch_size=256, engine=one_gpu, ema_half_life=None, draws=Draws())
        return replace(STAGES[res], **small)
    return STAGES[res]


@dataclass(frozen=True)
class CurriculumConfig:
    """All stages. A recipe in TOML changes these, and in [common] and [stages.RES] what stages take."""

    OWN: ClassVar = ("out", "dry_run", "gpu", "seeds")
    """What stages take and the curriculum sets for them."""

    preset: Literal["tiny", "mini", "small", "qwen-image"] = "tiny"
    """Size of the model. Default: the one that takes the text states of --data, else tiny."""
    data: tuple[Path, ...] = ()
    """Encoded data sets (of data_pipeline/produce.py); each stage takes those of its resolutions. Default: the demo's,
    made if they are missing."""
    components: Path | None = None
    """Folder with the VAE that draws samples; noted in the runs for sampling and export later."""
    out: Path = Path("runs")
    """Folder of the runs, pretrain-256 and so on."""
    init: Path | None = None
    """What the first stage starts from. Default: random weights, if that is stage 256."""
    common: tyro.conf.Suppress[dict[str, Any]] = field(default_factory=dict)
    """Fields of `StageConfig` for all stages, nested as in TOML."""
    stages: tyro.conf.Suppress[dict[str, Any]] = field(default_factory=lambda: {str(res): {} for res in RESOLUTIONS})
    """The stages that are run, by resolution, with their own fields."""
    dry_run: bool = False
    """Print the plan of each stage, do nothing."""
    gpu: str | None = None
    """What to plan for, as in 8xH100 or 1xRTX4090. Default: what is in this machine."""

    def stage_configs(self) -> list[StageConfig]:
        """The stages in order, each from the one before. UserError for what a stage does not know."""
        if unknown := set(self.stages) - set(map(str, RESOLUTIONS)):
            known = ", ".join(map(str, RESOLUTIONS))
            raise UserError(f"there is no stage {min(unknown)}; stages are {known}")
        found: list[StageConfig] = []
        for res in sorted(map(int, self.stages)):
            tables = {"common": self.common, f"stages.{res}": self.stages[str(res)]}
            said = {name: value for table in tables.values() for name, value in table.items()}
            start = recipe(res, said.get("preset", self.preset))
            if any("ema_decay" in table.get("engine", {}) for table in tables.values()):
                start = replace(start, ema_half_life=None)
            for where, table in tables.items():
                if wrong := sorted(set(table) & {"res", *self.OWN}):
                    raise UserError(f"{where}: {', '.join(wrong)} cannot be a stage's own in a curriculum")
                start = from_dict(StageConfig, table, start, where)
            place = self.out / default_place(res).name
            init = start.init or (found[-1].out if found else self.init)
            shared = dict(components=self.components or start.components, gpu=self.gpu)
            found.append(replace(start, **shared, init=init, out=place, dry_run=self.dry_run))
        return found


def likely_preset(argv: list[str]) -> str:
    """The preset of --init; without one, the first that takes the text states of --data; tiny without either."""
    init = flag(argv, "--init")
    if init is not None and Path(init) != AT_RANDOM:
        found = look(init)
        if found.kind == "hub":
            return "qwen-image"
        if (preset := preset_of(replace(found.model_config(), rope="msrope"))) is None:
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
