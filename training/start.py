"""One main for all trainers: from flags to a model, its pictures' networks, a folder, and the loop.

A trainer's file is an algorithm: a config, and a class made of (config, studio) that follows `training.algorithm`. Its
entry stands above its heavy imports, so that --help answers at once:

    if __name__ == "__main__":
        start(Config, "posttrain.dpo:DPO")

Imports no torch at the top, for `--help`.
"""

import json
import os
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Protocol, Self

import tyro

from command_line import UserError, flag, load_named, run
from files import hash_files, write_json
from model.config import PRESETS, MMDiTConfig
from model.diffusers_io.config import ADAPTER_FILES
from training.cost.step import Work
from training.engine.config import EngineConfig, OptimizerConfig, ParallelConfig
from training.loop import LoopConfig
from training.plan import before_a_run, plan, prompt_tokens
from training.source import BASE, LARGE_PARAMETERS, NOTE, SIDE, TOY_PARAMETERS, Source, look, side_of_data

if TYPE_CHECKING:
    from model.sampling.draw import Request
    from training.algorithm import Batches
    from training.studio import Studio

ADAPTERS_RATE = 10
"""Learning rate of adapters in that of the weights (LoRA Without Regret, 2025; Flow-GRPO's 3e-4 and 3e-5)."""
TOY_VALIDATION = "evaluation.validation:ShapesValidation"
"""Of a model of toy size, unless another is named."""


@dataclass(frozen=True)
class RunConfig:
    """What all trainers take; each adds its own. The defaults are those for large models."""

    init: Path | None = None
    """Run, checkpoint, diffusers folder, hub id or LoRA file to start from. Default: the shipped base."""
    base: Path | None = None
    """Model that the adapters of --init belong to, for files that don't say."""
    components: Path | None = None
    """Folder with tokenizer/, text_encoder/ and vae/. Default: the one that --init was trained with."""
    out: Path | None = None
    """Folder of the run."""
    max_tokens: int = 16384
    """Tokens, of text and image, in a microbatch."""
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = field(default_factory=LoopConfig)
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)
    sample_every: int = 200
    """Steps between pictures in samples/. 0 for none."""
    sample_prompts: Path | None = None
    """Text file with a prompt in each line: drawn beside the others in samples/, by the text encoder of the
    components."""
    validation: str | None = None
    """MODULE:CLASS or FILE.py:CLASS whose prompts the moving average draws and which scores the pictures."""
    validate_every: int = 500
    """Steps between validations. 0 for none."""
    seeds: int = 1
    """Run so many times, with --seed and the numbers after it, into OUT/seed-N, and compare."""
    dry_run: bool = False
    """Print the plan, do nothing."""
    gpu: str | None = None
    """What to plan for, as in 8xH100 or 1xRTX4090 (`training/cost/cards.py`). Default: what is in this machine."""

    NAME: ClassVar[str] = "posttrain"
    MEASURES_FIRST: ClassVar[bool] = True
    """Whether hooks are called before the first step, too."""
    GUIDANCE: ClassVar[float] = 4.0
    """Of samples and validations, of trainers that draw nothing to train on."""
    TOY: ClassVar[dict[str, Any]] = {}
    """What differs for a model of toy size."""

    @classmethod
    def recipe(cls, model: MMDiTConfig) -> Self:
        """The defaults for a model."""
        if model.num_parameters < TOY_PARAMETERS:
            common = dict(max_tokens=4096, sample_every=50, validate_every=50, validation=TOY_VALIDATION)
            return replace(cls(), out=Path(f"runs/{cls.NAME}"), **{**common, **cls.TOY})
        config = replace(cls(), out=Path(f"runs/{cls.NAME}"))
        if model.num_parameters < LARGE_PARAMETERS:
            return config
        return replace(
            config, engine=replace(config.engine, parallel=ParallelConfig(tp=8, sp=True), average_on_host=True)
        )

    @classmethod
    def defaults(cls, argv: list[str]) -> Self:
        """The recipe for the model that the command line names, or that the run would start from."""
        out = Path(flag(argv, "--out") or f"runs/{cls.NAME}")
        found = look(_noted(out) or flag(argv, "--init") or BASE, flag(argv, "--base"))
        model = PRESETS["qwen-image"] if found.base.kind == "hub" else found.model_config()
        config, adapted = cls.recipe(model), found.lora or flag(argv, "--lora-rank") not in (None, "0")
        return config.for_adapters(model) if adapted else config

    def for_adapters(self, model: MMDiTConfig) -> Self:
        """This recipe with adapters in place of weights: on one device, at a rate of their own."""
        faster = replace(self.engine.optimizer, lr=ADAPTERS_RATE * self.engine.optimizer.lr)
        engine = replace(self.engine, parallel=ParallelConfig(), optimizer=faster, average_on_host=False)
        if model.num_parameters >= LARGE_PARAMETERS:
            engine = replace(engine, recompute="block")
        return replace(self, engine=engine)

    def completed(self) -> Self:
        """The config with its open fields filled in. UserError for what cannot be."""
        source, engine = _starting_point(self), self.engine
        if engine.quantize != "none" and engine.lora is None and source.lora is None:
            raise UserError("--quantize stores weights that stay as they are: train adapters beside them, --lora-rank")
        if self.dry_run and source.kind == "hub":  # a plan downloads nothing
            return replace(self, init=source.path, components=self.components or source.path)
        components = self.components or source.components()
        if source.lora is not None:
            if engine.lora not in (None, source.lora):
                raise UserError(
                    f"{source.path} holds other adapters, of rank {source.lora.rank}: leave out --lora-*, they go on"
                )
            engine = engine.with_lora(source.lora)
        if source.is_ours:
            source = look(source.checkpoint(thorough=False))
        return replace(self, init=source.path, components=Path(components), engine=engine)

    @property
    def source(self) -> Source:
        """What the run starts from."""
        return look(self.init, self.base)

    @property
    def model(self) -> MMDiTConfig:
        """Config of the model to train; in a plan, one on the hub is taken to be Qwen-Image."""
        on_hub = self.dry_run and self.source.base.kind == "hub"
        return PRESETS["qwen-image"] if on_hub else self.source.model_config()

    @property
    def guidance(self) -> float:
        """Guidance of samples and validations."""
        return getattr(self, "cfg_scale", self.GUIDANCE)

    def own_prompts(self) -> list[str]:
        """The prompts of --sample-prompts. UserError if there are none, or nothing that could encode them."""
        if self.sample_prompts is None:
            return []
        found = [line.strip() for line in self.sample_prompts.read_text().splitlines() if line.strip()]
        if not found:
            raise UserError(f"{self.sample_prompts} holds no prompts; give one a line")
        if self.components is None or not (self.components / "text_encoder").is_dir():
            raise UserError(f"--sample-prompts needs a text encoder, and {self.components} has none: see --components")
        return found

    def side_px(self) -> int:
        """Side of the square whose area the run's pictures have; validation draws at it."""
        return picture_side(None, self.source)

    def work(self) -> Work:
        """What a step asks of the model; by default one microbatch for each of eight processes."""
        img, txt = (self.side_px() // 16) ** 2, prompt_tokens(self.model)
        return Work(8 * max(1, self.max_tokens // (img + txt)), img, txt)

    def plan(self) -> str:
        """What `--dry-run` prints."""
        return plan(self)

    def summary(self) -> str:
        """What a run says first, in a line."""
        trained = "" if self.engine.lora is None else f"adapters of rank {self.engine.lora.rank} on "
        size = f"{self.model.num_parameters:,} parameters"
        return f"{self.out}: {trained}{size} from {self.init}, components {self.components}"


def optimizer(lr: float, warmup_steps: int = 20, ema_decay: float = 0.999) -> EngineConfig:
    """Engine settings of a recipe that differ in these."""
    return EngineConfig(optimizer=OptimizerConfig(lr=lr, warmup_steps=warmup_steps), ema_decay=ema_decay)


def toy_optimizer(lr: float, dtype: Literal["auto", "float32", "bfloat16"] = "auto") -> EngineConfig:
    """The same for short runs of a tiny model."""
    return replace(optimizer(lr, warmup_steps=0, ema_decay=0.9), dtype=dtype)


def picture_side(size_px: int | None, source: Source) -> int:
    """`size_px`, or the side that `source` was trained at. UserError if it is no multiple of 16."""
    if size_px is None:
        size_px = source.side_px()
    if size_px < 16 or size_px % 16:
        raise UserError(f"--size-px {size_px}: pictures need sides that are multiples of 16")
    return size_px


class Trainer(Protocol):
    """What `main` asks of an algorithm beyond the engine's contract (`training.algorithm.Algorithm`)."""

    def __init__(self, config: Any, studio: "Studio"): ...

    def batches(self) -> "Batches":
        """The run's batches; called once, when the weights are in place."""

    def shown(self) -> "list[Request]":
        """The pictures of samples/."""


def start(config: type[RunConfig], algorithm: str) -> NoReturn:
    """Run MODULE:CLASS with the flags of the command line, and exit."""
    description = sys.modules["__main__"].__doc__
    run(partial(main, algorithm=algorithm), config.defaults, description)
    raise SystemExit(0)


def main(given: RunConfig, algorithm: "str | type[Trainer]") -> None:
    """Train as `given` says; with several seeds, once for each."""
    if given.seeds < 1:
        raise UserError(f"--seeds {given.seeds}: a number of runs; the seed of a single one is --seed")
    config = given.completed()
    if config.dry_run:
        print(config.plan())
        return
    kind = load_named(algorithm) if isinstance(algorithm, str) else algorithm
    from training.engine import device

    try:
        if config.seeds == 1:
            train_once(config, kind, given.init)
        else:
            from training.seeds import train_seeds

            train_seeds(config, lambda one: train_once(one, kind, given.init))
    finally:
        device.stop()


def train_once(config: RunConfig, kind: "type[Trainer]", given: Path | None) -> bool:
    """One run, from its starting weights or its newest checkpoint to its end; returns what `loop.train` does."""
    from training.algorithm import Fixed
    from training.engine.checkpoint import list_checkpoints
    from training.engine.step import Engine
    from training.loading import fill_weights
    from training.loop import train
    from training.run_folder import RunFolder
    from training.studio import Studio

    config.own_prompts()  # refuses before anything is loaded
    noted = _noted(config.out)
    foreseen = before_a_run(config) if os.environ.get("RANK", "0") == "0" else None
    if foreseen is not None:
        print(foreseen, flush=True)
    engine = Engine(config.model, config.engine, config.loop.steps)
    trainer = kind(config, Studio(engine, config.components, config.max_tokens))  # refuses before anything is written
    run_folder = RunFolder(config.out, config, writes=engine.rank == 0)
    if engine.rank == 0:
        print(f"{config.summary()}; {engine.world_size} {engine.device.type} process(es)", flush=True)
    resumes = bool(list_checkpoints(run_folder.checkpoints))
    adapted = config.engine.lora is not None  # their checkpoints hold nothing else
    if not resumes or adapted or any(isinstance(policy, Fixed) for policy in trainer.frozen.values()):
        read = fill_weights(engine, config.init, config.loop.seed, config.base)
        if engine.rank == 0 and read is not None:
            _note(config.out, given, *read, noted is not None)
    for name, policy in trainer.frozen.items():
        engine.frozen.keep(name, policy)
    batches = trainer.batches()
    if engine.rank == 0 and getattr(config, "data", ()):
        run_folder.facts[SIDE] = side_of_data(config.data)
    stopped = train(engine, trainer, batches, config.loop, run_folder, _hooks(config, trainer, run_folder))
    if hasattr(batches, "close"):
        batches.close()
    if hasattr(trainer, "finished") and engine.rank == 0:
        trainer.finished(run_folder.path)
    return stopped


def _hooks(config: RunConfig, trainer: "Trainer", run_folder: Any) -> list:
    """What the trainer measures, then pictures and validation, if there are a VAE and a text encoder for them."""
    from model.sampling.draw import Sampler
    from model.sampling.schedule import FixedSchedule
    from training.hooks import SampleHook, ValidationHook, requests_for
    from training.studio import SharedGenerator

    hooks: list[Any] = trainer.hooks(run_folder) if hasattr(trainer, "hooks") else []
    if config.components is None:
        return hooks
    studio, first = trainer.studio, config.MEASURES_FIRST
    sampler = Sampler(FixedSchedule(20), cfg_scale=config.guidance)
    if config.sample_every:
        shown = trainer.shown() + requests_for(config.own_prompts(), studio, config.side_px())
        hooks.append(SampleHook(config.sample_every, run_folder, studio, shown, sampler, first))
    if config.validation and config.validate_every and studio.has_text_encoder:
        validation = load_named(config.validation)()
        generator = SharedGenerator(studio, validation.texts, sampler)
        hooks.append(ValidationHook(config.validate_every, run_folder, generator, validation, config.side_px(), first))
    return hooks


def _starting_point(config: RunConfig) -> Source:
    """What the run began from, or is to begin from.

    UserError for a source that is not there, or not the one that the run started from.
    """
    noted = _noted(config.out)
    if noted is None:
        return look(config.init or BASE, config.base)
    note = json.loads((config.out / NOTE).read_text())
    if config.init is not None and str(config.init) not in (note["given"], note["source"]):
        raise UserError(f"{config.out} started from {note['given']}, not from {config.init}; choose another --out")
    if not noted.exists():
        raise UserError(f"{noted}, which {config.out} started from, is gone; restore it or choose another --out")
    return look(noted, config.base or note.get("base"))


def _noted(out: Path | None) -> Path | None:
    """What the run in `out` started from; None if there is no run yet."""
    if out is None or not (out / NOTE).is_file():
        return None
    return Path(json.loads((out / NOTE).read_text())["source"])


def _note(out: Path, given: Path | None, read: Path, base: Path, resumes: bool) -> None:
    """Note what a run started from, for its newest checkpoint may be another when the run goes on.

    Raises ValueError if a run that goes on began from other weights.
    """
    from training.engine.checkpoint import MANIFEST

    def stamp(path: Path) -> str:
        names = (path / name for name in (MANIFEST, "transformer/config.json", *ADAPTER_FILES))
        return hash_files([next((file for file in names if file.exists()), path)])

    note = {"given": str(given or read), "source": str(read), "hash": stamp(read)}
    note |= {"base": str(base), "base_hash": stamp(base)}
    if not resumes:
        write_json(out / NOTE, note)
        return
    there = json.loads((out / NOTE).read_text())
    for path, kept in ((read, "hash"), (base, "base_hash")):
        if kept in there and there[kept] != note[kept]:
            raise ValueError(
                f"{path} holds other weights ({note[kept][:8]}) than when {out} started ({there[kept][:8]})"
            )
