"""What lies at a path: a run, a checkpoint, adapters, a diffusers folder, or the name of one on the hub.

The only place that knows. Imports no torch: `--help` asks here which recipe fits a model.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from command_line import UserError, read_toml
from files import hash_files
from model.config import PRESETS, MMDiTConfig
from model.diffusers_io.config import locate, read_config
from training.engine import checkpoint

BASE = Path(__file__).resolve().parent.parent / "base"
"""The model of the shapes world that is shipped: what every entry takes that is told nothing else."""
Kind = Literal["run", "checkpoint", "lora", "diffusers", "hub"]
PUBLISHED_SIDE_PX = 1024
"""Side of the pictures that a published model is post-trained on, unless told otherwise."""
TOY_PARAMETERS = 10**8
"""Models below this have recipes for a laptop; above, for GPUs."""
LARGE_PARAMETERS = 4 * 10**9
"""From here on, weights and their gradients are split over the GPUs of a node."""
TOY_SIDE_PX = {256: 64, 640: 80, 1328: 128}
"""Side of the squares that each stage of pretraining trains the tiny preset on."""
COMPONENT_PARTS = ("text_encoder", "tokenizer", "vae", "scheduler", "processor")


@dataclass(frozen=True)
class Source:
    """A model on disk, or on the hub."""

    path: Path
    kind: Kind

    @cached_property
    def run(self) -> Path | None:
        """The run folder (with a config.toml) that this is, or is a checkpoint of."""
        folders = (self.path, *self.path.absolute().parents[:2])
        return next((p for p in folders if (p / "config.toml").is_file()), None)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of that run, the folders that they name found from here; empty without a run."""
        if self.run is None or self.kind not in ("run", "checkpoint"):
            return {}
        settings = read_toml(self.run / "config.toml")
        for name in ("components", "data"):
            if name in settings:
                value = settings[name]
                found = [named_by(self.run, v) for v in ([value] if isinstance(value, str) else value)]
                settings[name] = found[0] if isinstance(value, str) else found
        return settings

    @property
    def is_ours(self) -> bool:
        """Whether the weights are in a checkpoint of ours."""
        return self.kind in ("run", "checkpoint")

    def checkpoint(self, thorough: bool = True) -> Path:
        """The newest intact checkpoint of a run (see `checkpoint.resolve`). ValueError if there is none."""
        return checkpoint.resolve(self.path, thorough)

    def model_config(self) -> MMDiTConfig:
        """Config of the model. ValueError if it is none that we know."""
        if self.is_ours:
            return MMDiTConfig(**checkpoint.read_state(self.checkpoint(thorough=False))["model"])
        return read_config(self.folder)

    @cached_property
    def folder(self) -> Path:
        """The diffusers folder, downloaded if it is on the hub. ValueError for anything else."""
        return locate(self.path)

    def components(self) -> Path:
        """The folder with text encoder, tokenizer and VAE that goes with the model. UserError if there is none."""
        if not self.is_ours:
            return self.folder
        named = self.settings.get("components")
        if named is None or not named.is_dir():
            where = "no components folder" if named is None else f"the components folder {named}, which is not there"
            raise UserError(f"{self.path} names {where}; give --components")
        return named

    def side_px(self) -> int:
        """Side of the square whose area the model's pictures have, as it was trained."""
        if "size_px" in self.settings:
            return self.settings["size_px"]
        if self.settings.get("data"):
            from data_pipeline.dataset import read_fingerprint

            return read_fingerprint(self.settings["data"][0], growing=True).resolution
        if self.kind == "hub" or self.model_config().num_parameters > TOY_PARAMETERS:
            return PUBLISHED_SIDE_PX
        return TOY_SIDE_PX[256]

    def fingerprint(self, ema: bool = True) -> str:
        """Hash of the weights: of a run, its newest intact checkpoint's manifest stands for them."""
        if self.is_ours:
            return hash_files([self.checkpoint() / checkpoint.MANIFEST]) + f" ema {ema}"
        return json.dumps(_hash_parts(self.folder, ("transformer",)))


def look(path: Path | str) -> Source:
    """What lies at a path. UserError if it is nothing that holds a model."""
    folder = Path(path)
    if (folder / checkpoint.STATE).exists() or (folder.name.startswith("step_") and folder.is_dir()):
        return Source(folder, "checkpoint")
    if (folder / "checkpoints").is_dir() or (folder.is_dir() and checkpoint.list_checkpoints(folder)):
        return Source(folder, "run")
    if (folder / "transformer").is_dir():
        return Source(folder, "diffusers")
    adapters = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
    if folder.suffix == ".safetensors" or any((folder / name).is_file() for name in adapters):
        return Source(folder, "lora")
    if not folder.exists() and str(path).count("/") == 1 and not str(path).startswith((".", "/", "runs/")):
        return Source(folder, "hub")
    what = "holds no model (no checkpoints, no transformer/)" if folder.exists() else "does not exist"
    raise UserError(f"{path} {what}; give a run, a checkpoint, a diffusers folder or a hub id")


def preset_of(config: MMDiTConfig) -> str | None:
    """Name of the preset with this config."""
    return next((name for name, preset in PRESETS.items() if preset == config), None)


def named_by(run: Path, folder: Path | str) -> Path:
    """A folder that the run's config.toml names, also from elsewhere than where the run was started.

    A relative name is looked for here, then below each folder that the run lies in; what is nowhere stays as it is.
    """
    places = (Path(), *Path(run).absolute().parents)
    return next((place / folder for place in places if (place / folder).is_dir()), Path(folder))


def components_fingerprint(folder: Path) -> list[str]:
    """Hashes of the parts of a components folder."""
    return _hash_parts(folder, COMPONENT_PARTS)


def _hash_parts(folder: Path, parts: tuple[str, ...]) -> list[str]:
    files = {part: sorted(p for p in (Path(folder) / part).glob("*") if p.is_file()) for part in parts}
    return [f"{part} {hash_files(paths)}" for part, paths in files.items()]
