"""Where pictures come from: one of our runs or checkpoints, or any Qwen-Image diffusers folder."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from command_line import UserError, from_dict, read_toml
from model.conditioner import Conditioner
from model.config import LoRAConfig, MMDiTConfig
from model.diffusers_io.folder import load_transformer, locate, read_config
from model.lora import merge, split_adapters
from model.mmdit import MMDiT
from model.text_to_image import TextToImage
from vae.autoencoder import VAE


def load(
    source: Path | str,
    ema: bool = True,
    components: Path | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> TextToImage:
    """The pictures' maker of `source`: a run folder, a checkpoint in one, a diffusers folder or a hub id.

    `ema` takes a run's averaged weights; `components` replaces the folder that the source names; `settings` are those
    of `TextToImage`. Raises UserError if the source is none of these.
    """
    if run := run_folder(source):
        config, weights = whole_weights(source, ema)
        model = _empty_model(config, device, dtype)
        model.load_state_dict(weights)
        components = components or run_components(run)
    else:
        folder = locate(source)
        model = _empty_model(read_config(folder), device, dtype)
        load_transformer(folder, model)
        components = components or folder
    conditioner = Conditioner.from_folder(components, device, dtype)
    vae = VAE.from_folder(components, device, dtype)
    return TextToImage(model.eval().requires_grad_(False), conditioner, vae, device, **settings)


def run_folder(source: Path | str) -> Path | None:
    """The run that `source` is, or is a checkpoint of; None if it is neither."""
    return next((p for p in (Path(source), *Path(source).parents[:2]) if (p / "config.toml").is_file()), None)


def whole_weights(source: Path | str, ema: bool = True) -> tuple[MMDiTConfig, dict[str, Tensor]]:
    """Config and weights of a run or checkpoint, adapters merged in (their settings are `lora` in its config.toml)."""
    from training.engine.checkpoint import read_weights

    config, weights = read_weights(Path(source), ema=ema)
    base, adapters = split_adapters(weights)
    if not adapters:
        return config, weights
    settings = read_toml(run_folder(source) / "config.toml").get("lora")
    if settings is None:
        raise UserError(f"{source} holds adapters, but its config.toml has no [lora] table with their rank and alpha")
    return config, merge(base, adapters, from_dict(LoRAConfig, settings).scale)


def run_components(run: Path) -> Path:
    """The components folder that a run was trained with."""
    from training.run_folder import named_by

    named = read_toml(run / "config.toml").get("components")
    components = None if named is None else named_by(run, named)
    if components is None or not components.is_dir():
        raise UserError(f"{run}/config.toml names the components folder {named}, which is not there; give --components")
    return components


def _empty_model(config: MMDiTConfig, device: torch.device | str, dtype: torch.dtype) -> MMDiT:
    with torch.device("meta"):
        model = MMDiT(config)
    return model.to(dtype).to_empty(device=device)
