"""What lies at a path: a run, a checkpoint, adapters, a diffusers folder, or the name of one on the hub.

The only place that knows. Imports no torch: `--help` asks here which recipe fits a model.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from command_line import UserError, read_toml
from files import hash_files
from model.config import PRESETS, LoRAConfig, MMDiTConfig
from model.diffusers_io.config import ADAPTER_FILES, locate, read_config
from training.engine import checkpoint

BASE = Path(__file__).resolve().parent.parent / "base"
"""The model of the shapes world that is shipped: what every entry takes that is told nothing else."""
AT_RANDOM = Path("random")
"""What --init names to start from random weights."""
Kind = Literal["run", "checkpoint", "lora", "diffusers", "hub"]
PUBLISHED_SIDE_PX = 1024
"""Side of the pictures that a published model is post-trained on, unless told otherwise."""
TOY_PARAMETERS = 10**8
"""Models below this have recipes for a laptop; above, for GPUs."""
LARGE_PARAMETERS = 4 * 10**9
"""From here on, weights and their gradients are split over the GPUs of a node."""
TOY_SIDE_PX = {256: 64, 640: 96, 1328: 128}
"""Side of the squares that each stage of pretraining trains the tiny preset on."""
SIDE = "side_px"
"""What a checkpoint calls the side of the squares that its run was trained on."""
NOTE = "init.json"
"""File of a run that says what it started from, and what its adapters belong to if it trains adapters."""
COMPONENT_PARTS = ("text_encoder", "tokenizer", "vae", "scheduler", "processor")


@dataclass(frozen=True)
class Source:
    """A model on disk, or on the hub, or adapters and the model that they belong to."""

    path: Path
    kind: Kind
    named_base: Path | None = None
    """The model that adapters belong to, where a user has said so."""

    @cached_property
    def run(self) -> Path | None:
        """The run folder (with a config.toml) that this is, or is a checkpoint of."""
        folders = (self.path, *self.path.absolute().parents[:3])
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

    @cached_property
    def lora(self) -> LoRAConfig | None:
        """Settings of the adapters; None if the weights are a model's."""
        if self.kind == "lora":
            from model.diffusers_io.lora_files import read_adapters

            return read_adapters(self.path)[0]
        found = checkpoint.read_state(self.checkpoint(thorough=False)).get("lora") if self.is_ours else None
        return None if found is None else LoRAConfig(**found)

    @cached_property
    def base(self) -> "Source":
        """The whole model: what adapters belong to, else this. UserError if that is not known, or gone."""
        if self.lora is None:
            return self
        if self.kind == "lora":
            from model.diffusers_io.lora_files import read_base

            named = self.named_base or read_base(self.path)
            if named is None:
                raise UserError(f"{self.path} does not say what model it belongs to: name it by --base")
        elif self.run is None or not (self.run / NOTE).is_file():
            raise UserError(f"{self.path} holds adapters, but no {NOTE} that says what model they belong to")
        else:
            named = named_by(self.run, json.loads((self.run / NOTE).read_text())["base"])
        try:
            found = look(named)
        except UserError as error:
            raise UserError(f"the adapters of {self.path} belong to {named}: {error}") from None
        return found.base

    @property
    def hub_id(self) -> str | None:
        """Name of the model on the hub, if it is from there."""
        if self.kind == "hub":
            return str(self.path)
        found = re.search(r"models--([^/]+?)--([^/]+)/snapshots/", str(self.path))
        return None if found is None else "/".join(found.groups())

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
        return self.base.model_config() if self.kind == "lora" else read_config(self.folder)

    @cached_property
    def folder(self) -> Path:
        """The diffusers folder, downloaded if it is on the hub. ValueError for anything else."""
        return locate(self.path)

    def components(self) -> Path:
        """The folder with text encoder, tokenizer and VAE that goes with the model. UserError if there is none."""
        if self.kind == "lora":
            return self.base.components()
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
        if self.is_ours and SIDE in (extra := checkpoint.read_state(self.checkpoint(thorough=False))["extra"]):
            return extra[SIDE]
        if data := self.settings.get("data"):
            if gone := [str(folder) for folder in data if not folder.exists()]:
                raise UserError(
                    f"{self.path} does not say its size, and {', '.join(gone)}, which did, is gone: put it back"
                )
            return side_of_data(data)
        if self.kind == "lora":
            return self.base.side_px()
        if self.kind == "hub" or self.model_config().num_parameters > TOY_PARAMETERS:
            return PUBLISHED_SIDE_PX
        return TOY_SIDE_PX[256]

    def fingerprint(self, ema: bool = True) -> str:
        """Hash of the weights: of a run, its newest intact checkpoint's manifest stands for them."""
        if self.is_ours:
            own = hash_files([self.checkpoint() / checkpoint.MANIFEST]) + f" ema {ema}"
        elif self.kind == "lora":
            own = hash_files(sorted(self.path.glob("*")) if self.path.is_dir() else [self.path])
        else:
            own = json.dumps(_hash_parts(self.folder, ("transformer",)))
        return own if self.lora is None else f"{own} on {self.base.fingerprint()}"


def look(path: Path | str, base: Path | str | None = None) -> Source:
    """What lies at a path; `base` is the model that adapters belong to, for files that don't say.

    UserError if it is nothing that holds a model.
    """
    folder = Path(path)
    if (folder / checkpoint.STATE).exists() or (folder.name.startswith("step_") and folder.is_dir()):
        return Source(folder, "checkpoint")
    if (folder / "checkpoints").is_dir() or (folder.is_dir() and checkpoint.list_checkpoints(folder)):
        return Source(folder, "run")
    if (folder / "transformer").is_dir():
        return Source(folder, "diffusers")
    if folder.is_file() and folder.suffix == ".safetensors" or any((folder / n).is_file() for n in ADAPTER_FILES):
        return Source(folder, "lora", None if base is None else Path(base))
    if not folder.exists() and str(path).count("/") == 1 and not str(path).startswith((".", "/", "runs/")):
        return Source(folder, "hub")
    what = "holds no model (no checkpoints, no transformer/)" if folder.exists() else "does not exist"
    raise UserError(f"{path} {what}; give a run, a checkpoint, a diffusers folder or a hub id")


def side_of_data(folders: Iterable[Path]) -> int:
    """Side of the squares that the largest pictures of encoded data sets, whole or growing, have the area of."""
    from data_pipeline.dataset import read_fingerprint

    return max(read_fingerprint(folder, growing=True).resolution for folder in folders)


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
