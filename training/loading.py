"""Models out of whatever lies at a path: into an engine that trains, or composed to draw pictures."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.conditioner import REFERENCE_SIDE_PX, Conditioner
from model.config import MMDiTConfig
from model.diffusers_io.config import read_config
from model.diffusers_io.folder import load_transformer, read_weights
from model.diffusers_io.lora_files import read_adapters
from model.lora import Adapters, merge, split_adapters
from model.mmdit import MMDiT
from model.text_to_image import TextToImage
from training.engine import checkpoint
from training.source import AT_RANDOM, Source, components_fingerprint, look
from vae.autoencoder import VAE

if TYPE_CHECKING:
    from training.engine.step import Engine


def fill_weights(
    engine: "Engine", source: Path | None, seed: int = 0, base: Path | None = None
) -> tuple[Path, Path] | None:
    """Fill the engine's weights from `source`, at random if it is None or AT_RANDOM; returns what was read, and the
    model in it.

    Of adapters, that is the model that they belong to: `base`, where they don't say. Adapters that train beside a
    whole model start over. Raises ValueError if `source` holds another model, or none.
    """
    if source in (None, AT_RANDOM):
        engine.initialize(seed)
        return None
    found = look(source, base)
    if found.lora is not None and engine.config.lora is None:
        raise ValueError(f"{source} holds adapters, and no adapters are to be trained: export it as a model first")
    model = found.base
    if model.is_ours:
        whole = engine.load_run(model.path)
    elif (there := read_config(model.folder)) == engine.model_config:
        engine.load_weights(read_weights(model.folder))
        whole = model.folder
    else:
        raise ValueError(f"{model.path} holds another model: {there}; this run's is {engine.model_config}")
    if found.lora is None:
        engine.initialize_adapters(seed)
        return whole, whole
    if found.is_ours:
        return engine.load_run(found.path), whole
    engine.load_adapters(read_adapters(found.path)[1])
    return found.path, whole


def load(
    source: Path | str,
    ema: bool = True,
    components: Path | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    base: Path | str | None = None,
    **settings: Any,
) -> TextToImage:
    """What draws the pictures of `source`: a run folder, a checkpoint in one, a diffusers folder, a hub id or adapters.

    `ema` takes a run's averaged weights; `components` replaces the folder that the source names; `base` is the model
    that adapters belong to, where they don't say; `settings` are those of `TextToImage`. Pictures to edit are seen at
    the area that the model was trained at. Raises UserError if the source is none of these.
    """
    found = look(source, base)
    model = empty_model(found.model_config(), device, dtype)
    if found.base.is_ours:
        model.load_state_dict(checkpoint.read_weights(found.base.path, ema or found.lora is not None)[1])
    else:
        load_transformer(found.base.folder, model)
    if found.lora is not None:
        added = adapters(found, ema)
        adapted = {name: model.get_parameter(name) for name in (f"{layer}.weight" for layer in added)}
        model.load_state_dict(merge(adapted, added, found.lora.scale), strict=False)
    components = components or found.components()
    conditioner = Conditioner.from_folder(components, device, dtype)
    vae = VAE.from_folder(components, device, dtype)
    if "reference_area" not in settings:
        settings["reference_area"] = min(REFERENCE_SIDE_PX, found.side_px()) ** 2
    return TextToImage(model.eval().requires_grad_(False), conditioner, vae, device, **settings)


def whole_weights(found: Source, ema: bool = True) -> tuple[MMDiTConfig, dict[str, Tensor]]:
    """Config and weights of a model, adapters merged in; `ema` takes a run's averaged ones."""
    if found.base.is_ours:
        config, weights = checkpoint.read_weights(found.base.path, ema or found.lora is not None)
    else:
        config, weights = found.model_config(), dict(read_weights(found.base.folder))
    if found.lora is not None:
        weights = merge(weights, adapters(found, ema), found.lora.scale)
    return config, weights


def adapters(found: Source, ema: bool = True) -> Adapters:
    """The adapters of a run, a checkpoint or a file, whole."""
    if found.kind == "lora":
        return read_adapters(found.path)[1]
    return split_adapters(checkpoint.read_weights(found.path, ema)[1])[1]


def fingerprint(source: str, ema: bool, components: Path | None, precision: str, base: Path | str | None = None) -> str:
    """Hash of all that decides a source's pictures, without loading it: weights, text encoder, VAE, precision."""
    found = look(source, base)
    parts = [found.fingerprint(ema), components_fingerprint(components or found.components()), precision]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def empty_model(config: MMDiTConfig, device: torch.device | str, dtype: torch.dtype) -> MMDiT:
    """A model whose weights are to be filled."""
    with torch.device("meta"):
        model = MMDiT(config)
    return model.to(dtype).to_empty(device=device)
