"""What every post-training run starts with: the model to improve, the components of its pictures, its folder.

Imports no torch at the top, for `--help`.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from command_line import UserError, read_toml
from training.demo_data import COMPONENTS, MODEL, TOY_SIDE_PX, demo_model
from training.engine.config import EngineConfig, OptimizerConfig, ParallelConfig, has_gpu
from training.loop import LoopConfig
from training.run_folder import named_by
from training.starting_point import fill_weights, is_run, read_model_config

if TYPE_CHECKING:
    from model.text_to_image import TextToImage
    from training.engine.step import Engine
    from training.run_folder import RunFolder
    from training.samples import SampleHook

DIFFUSERS_SIDE_PX = 1024
"""Side of the pictures that a published model is post-trained on, unless told otherwise."""
NOTE = "init.json"
"""File of a run that says what it started from."""
TOY = not has_gpu()
"""Whether defaults are for the tiny model on a CPU or for the 20B model on GPUs."""


@dataclass(frozen=True)
class RunConfig:
    """What all algorithms take; each adds its own."""

    init: Path | None = None
    """Run, checkpoint, diffusers folder or hub id to start from. Default: the newest run of an earlier stage."""
    components: Path | None = None
    """Folder with tokenizer/, text_encoder/ and vae/. Default: the one that --init was trained with."""
    out: Path = Path("runs/posttrain")
    """Folder of the run."""
    max_tokens: int = 4096 if TOY else 16384
    """Tokens, of text and image, in a microbatch."""
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = field(default_factory=LoopConfig)
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)
    sample_every: int = 50 if TOY else 200
    """Steps between pictures in samples/."""
    validate_every: int = 50 if TOY else 500
    """Steps between validations: frozen prompts of the shapes world are drawn and judged. 0 for none."""
    dry_run: bool = False
    """Print the plan, do nothing."""


Config = TypeVar("Config", bound=RunConfig)


def engine_defaults(lr: float, toy_lr: float) -> EngineConfig:
    """The engine's settings: the 20B model over four tensor-parallel GPUs, or the tiny one."""
    if TOY:
        return EngineConfig(optimizer=OptimizerConfig(lr=toy_lr, warmup_steps=0), ema_decay=0.9)
    return EngineConfig(ParallelConfig(tp=4, sp=True), OptimizerConfig(lr=lr, warmup_steps=20))


def resolve(config: Config, stages_before: tuple[str, ...]) -> Config:
    """The config with its open --init and --components filled in.

    Without --init a run starts from the newest run of `stages_before` (in runs/NAME or runs/*/NAME, the first name that
    has one), or else from a tiny model that is pretrained first. What a run started from is noted in its folder, for
    the newest checkpoint there may be another when the run goes on. Raises UserError for a source that is not there, or
    not the one that the run started from.
    """
    source = _noted(config) or config.init or _newest(stages_before) or demo_model(make=not config.dry_run)
    if is_run(source):
        from training.engine.checkpoint import resolve as newest_checkpoint

        source = newest_checkpoint(source)
        components = config.components or trained_with(source).get("components")
        if components is None:
            raise UserError(f"{source} names no components folder; give --components")
    elif source == MODEL:
        components = config.components or COMPONENTS
    else:
        from model.diffusers_io.folder import locate

        components = config.components or locate(source)
    return replace(config, init=source, components=Path(components))


def plan(config: RunConfig) -> str:
    """What a run starts from, in one line."""
    if config.init == MODEL:
        return f"{config.out}: no --init and no earlier run in runs/, so a tiny model is pretrained first ({MODEL})"
    parameters = read_model_config(config.init).num_parameters
    return f"{config.out}: {parameters:,} parameters from {config.init}, components {config.components}"


def begin(config: RunConfig, given: Path | None) -> "Engine":
    """The engine with its starting weights; says in one line, and notes in the run's folder, where they came from."""
    from training.engine.step import Engine

    engine = Engine(read_model_config(config.init), config.engine, config.loop.steps)
    if engine.rank == 0:
        print(f"{plan(config)}; {engine.world_size} {engine.device.type} process(es)", flush=True)
        if not (config.out / NOTE).exists():
            from files import write_json

            config.out.mkdir(parents=True, exist_ok=True)
            write_json(config.out / NOTE, {"given": str(given or config.init), "source": str(config.init)})
    fill_weights(engine, config.init, config.loop.seed)
    return engine


def artist(engine: "Engine", components: Path) -> "TextToImage":
    """Draws pictures with the engine's present weights."""
    import torch

    from model.conditioner import Conditioner
    from model.text_to_image import TextToImage
    from vae.autoencoder import VAE

    dtype = torch.bfloat16 if engine.device.type == "cuda" else torch.float32
    conditioner = Conditioner.from_folder(components, engine.device, dtype)
    vae = VAE.from_folder(components, engine.device, dtype).eval()
    return TextToImage(engine.model, conditioner, vae, engine.device, align=engine.align)


def sample_hook(every: int, run: "RunFolder", painter: "TextToImage", texts: list[str], size_px: int) -> "SampleHook":
    """Draws `texts` into the run's samples/ every so many steps."""
    import torch

    from data_pipeline.sample import EncodedSample
    from model.text_to_image import PIXELS_PER_LATENT
    from training.samples import SampleHook

    blank = torch.zeros(16, 1, size_px // PIXELS_PER_LATENT, size_px // PIXELS_PER_LATENT)
    prompts = [
        EncodedSample(f"sample-{i}", blank, c.txt, txt_empty=c.txt_empty) for i, c in enumerate(painter.encode(texts))
    ]
    return SampleHook(every, run, painter.vae, prompts, together=len(prompts) if TOY else 1)


def picture_side(size_px: int | None, source: Path) -> int:
    """`size_px`, or the side that `source` was trained at. UserError if it is no multiple of 16."""
    if size_px is None:
        settings = trained_with(source)
        size_px = settings.get("size_px", TOY_SIDE_PX[256] if source == MODEL else DIFFUSERS_SIDE_PX)
        if settings.get("data"):
            from data_pipeline.loader import read_fingerprint

            size_px = read_fingerprint(Path(settings["data"][0])).resolution
    if size_px < 16 or size_px % 16:
        raise UserError(f"--size-px {size_px}: pictures need sides that are multiples of 16")
    return size_px


def trained_with(source: Path) -> dict[str, Any]:
    """The settings (config.toml) of the run that `source` is, or is a checkpoint of; empty if it is neither."""
    folders = (source, *source.absolute().parents[:2])
    run = next((p for p in folders if (p / "config.toml").is_file()), None)
    if run is None:
        return {}
    settings = read_toml(run / "config.toml")
    if "components" in settings:
        settings["components"] = named_by(run, settings["components"])
    if "data" in settings:
        settings["data"] = [named_by(run, folder) for folder in settings["data"]]
    return settings


def _noted(config: RunConfig) -> Path | None:
    """What the run in --out started from; None if there is no run yet."""
    if not (config.out / NOTE).is_file():
        return None
    note = json.loads((config.out / NOTE).read_text())
    if config.init is not None and str(config.init) not in note.values():
        raise UserError(f"{config.out} started from {note['given']}, not from {config.init}; choose another --out")
    source = Path(note["source"])
    if source.parent.name == "checkpoints" and not source.exists():
        raise UserError(f"{source}, which {config.out} started from, is gone; restore it or choose another --out")
    return source


def _newest(names: tuple[str, ...]) -> Path | None:
    for name in names:
        found = [p for pattern in (name, f"*/{name}") for p in Path("runs").glob(f"{pattern}/checkpoints/step_*")]
        if found:
            return max(found, key=lambda p: p.stat().st_mtime).parent.parent
    return None
