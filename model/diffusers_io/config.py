"""Where a diffusers folder lies and what model is in it. Imports no torch: `--help` reads it."""

import json
from dataclasses import fields
from pathlib import Path

from model.config import MMDiTConfig

ADAPTER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Names of files of adapters, diffusers' and PEFT's."""
UNSUPPORTED = ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope")


def locate(source: str | Path) -> Path:
    """A local diffusers folder as it is; a hub id (`Qwen/Qwen-Image`) downloaded. ValueError if it is neither."""
    if (Path(source) / "transformer").is_dir():
        return Path(source)
    if Path(source).exists() or str(source).count("/") != 1:
        raise ValueError(f"{source} is no diffusers folder (it has no transformer/) and no hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source)))
    except Exception as error:
        raise ValueError(f"{source} is no local folder, and the hub does not give it: {error}") from None


def read_config(folder: Path) -> MMDiTConfig:
    """Config of `folder`/transformer. ValueError for another model or one with more parts."""
    file = Path(folder) / "transformer" / "config.json"
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist; give a folder that diffusers' QwenImagePipeline can load") from None
    if values.get("_class_name") != "QwenImageTransformer2DModel":
        raise ValueError(f"{file} describes a {values.get('_class_name')}, not a QwenImageTransformer2DModel")
    if used := [name for name in UNSUPPORTED if values.get(name)]:
        raise ValueError(f"{file} sets {', '.join(used)}, which this model does not have")
    return MMDiTConfig(**{f.name: values[f.name] for f in fields(MMDiTConfig) if f.name in values})
