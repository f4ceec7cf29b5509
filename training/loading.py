"""Models out of whatever lies at a path: into an engine that trains, or composed to draw pictures."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from command_line import UserError, from_dict, read_toml
from model.conditioner import REFERENCE_SIDE_PX, Conditioner
from model.config import LoRAConfig, MMDiTConfig
from model.diffusers_io.config import read_config
from model.diffusers_io.folder import load_transformer, read_weights
from model.lora import merge, split_adapters
from model.mmdit import MMDiT
from model.text_to_image import TextToImage
from training.engine import checkpoint
from training.source import components_fingerprint, look
from vae.autoencoder import VAE

if TYPE_CHECKING:
    from training.engine.step import Engine


def fill_weights(engine: "Engine", source: Path | None, seed: int = 0) -> Path | None:
    """Fill the engine's weights from `source`, at random if it is None; returns what was read.

    Raises ValueError if it holds another model, or none.
    """
    if source is None:
        engine.initialize(seed)
        return None
    found = look(source)
    if found.is_ours:
        return engine.load_run(found.path)
    if (there := read_config(found.folder)) != engine.model_config:
        raise ValueError(f"{source} holds another model: {there}; this run's is {engine.model_config}")
    engine.load_weights(read_weights(found.folder))
    return found.folder


def load(
    source: Path | str,
    ema: bool = True,
    components: Path | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> TextToImage:
    """What draws the pictures of `source`: a run folder, a checkpoint in one, a diffusers folder or a hub id.

    `ema` takes a run's averaged weights; `components` replaces the folder that the source names; `settings` are those
    of `TextToImage`. Pictures to edit are seen at the area that the model was trained at. Raises UserError if the
    source is none of these.
    """
    found = look(source)
    if found.is_ours:
        config, weights = whole_weights(source, ema)
        model = _empty_model(config, device, dtype)
        model.load_state_dict(weights)
    else:
        model = _empty_model(read_config(found.folder), device, dtype)
        load_transformer(found.folder, model)
    components = components or found.components()
    conditioner = Conditioner.from_folder(components, device, dtype)
    vae = VAE.from_folder(components, device, dtype)
    settings = {"reference_area": min(REFERENCE_SIDE_PX, found.side_px()) ** 2} | settings
    return TextToImage(model.eval().requires_grad_(False), conditioner, vae, device, **settings)


def whole_weights(source: Path | str, ema: bool = True) -> tuple[MMDiTConfig, dict[str, Tensor]]:
    """Config and weights of a run or checkpoint, adapters merged in (their settings are `lora` in its config.toml)."""
    config, weights = checkpoint.read_weights(Path(source), ema=ema)
    base, adapters = split_adapters(weights)
    if not adapters:
        return config, weights
    run = look(source).run
    settings = None if run is None else read_toml(run / "config.toml").get("lora")
    if settings is None:
        raise UserError(f"{source} holds adapters, but its config.toml has no [lora] table with their rank and alpha")
    return config, merge(base, adapters, from_dict(LoRAConfig, settings).scale)


def fingerprint(source: str, ema: bool, components: Path | None, precision: str) -> str:
    """Hash of all that decides a source's pictures, without loading it: weights, text encoder, VAE, precision."""
    found = look(source)
    parts = [found.fingerprint(ema), components_fingerprint(components or found.components()), precision]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _empty_model(config: MMDiTConfig, device: torch.device | str, dtype: torch.dtype) -> MMDiT:
    with torch.device("meta"):
        model = MMDiT(config)
    return model.to(dtype).to_empty(device=device)
