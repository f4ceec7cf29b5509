"""Adapter files: PEFT's, diffusers' and ComfyUI's, all safetensors, in and out.

    peft        FOLDER/adapter_model.safetensors + adapter_config.json; base_model.model.<layer>.lora_A.weight
    diffusers   FOLDER/pytorch_lora_weights.safetensors; transformer.<layer>.lora_A.weight, settings in its metadata
    comfyui     FILE.safetensors; diffusion_model.<layer>.lora_A.weight and .alpha

<layer> is diffusers' name. Files that other trainers wrote may also say lora_down / lora_up, or carry no prefix.
"""

import json
import os
import re
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from model.config import LoRAConfig
from model.diffusers_io.config import ADAPTER_FILES
from model.diffusers_io.names import from_diffusers, to_diffusers
from model.lora import Adapters

Format = Literal["diffusers", "peft", "comfyui"]
_PREFIX = {"diffusers": "transformer.", "peft": "base_model.model.", "comfyui": "diffusion_model."}
_FILE = {"diffusers": "pytorch_lora_weights.safetensors", "peft": "adapter_model.safetensors"}
BASE = "base_model_name_or_path"
"""PEFT's name of what adapters belong to; other formats have it in the file's metadata."""
_KEY = re.compile(
    r"(?:transformer\.|base_model\.model\.|diffusion_model\.)?(.+?)\.(lora_A|lora_B|lora_down|lora_up|alpha)"
    r"(?:\.default)?(?:\.weight)?"
)


def write_adapters(
    path: Path, adapters: Adapters, config: LoRAConfig, format: Format = "diffusers", base: str | None = None
) -> Path:
    """Write adapters (whole, by our names) into the folder `path`, for ComfyUI as the file `path`; returns the file.

    `base` is the model that they belong to, a folder or a hub id.
    """
    from safetensors.torch import save_file

    prefix, path = _PREFIX[format], Path(path)
    named = {to_diffusers(name): pair for name, pair in sorted(adapters.items())}
    tensors = {}
    for name, (a, b) in named.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{prefix}{name}.lora_B.weight"] = b.detach().cpu().contiguous()
        if format == "comfyui":  # it scales by alpha / rank
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(config.scale * config.rank)
    metadata, settings = {"format": "pt"}, _peft_settings(config, list(named), base)
    if base is not None:
        metadata[BASE] = base
    if format == "diffusers":
        record = {f"transformer.{k}": v for k, v in settings.items()}
        metadata["lora_adapter_metadata"] = json.dumps(record, indent=2, sort_keys=True)
    file = path if format == "comfyui" else path / _FILE[format]
    file.parent.mkdir(parents=True, exist_ok=True)
    if format == "peft":
        (path / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, file)
    return file


def _peft_settings(config: LoRAConfig, layers: list[str], base: str | None) -> dict:
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    return {
        "peft_type": "LORA",
        BASE: base,
        "r": config.rank,
        "lora_alpha": alpha,
        "use_rslora": config.rank_stabilised,
        "target_modules": layers,
        "bias": "none",
        "lora_dropout": 0.0,
    }


def adapter_file(path: Path) -> Path:
    """The file of adapters that a path names, or that lies in the folder. ValueError if there is none."""
    file = next((f for n in ADAPTER_FILES if (f := Path(path) / n).is_file()), Path(path))
    if not file.is_file():
        raise ValueError(f"{path} holds no adapters: neither {' nor '.join(ADAPTER_FILES)}")
    return file


def read_base(path: Path) -> str | None:
    """The model that adapters say they belong to, a folder or a hub id; None if they don't."""
    from safetensors import safe_open

    file = adapter_file(path)
    with safe_open(file, framework="numpy") as content:
        named = (content.metadata() or {}).get(BASE)
    if named is None and (record := file.with_name("adapter_config.json")).is_file():
        named = json.loads(record.read_text()).get(BASE)
    return named or None


def read_adapters(path: Path) -> tuple[LoRAConfig, Adapters]:
    """Config and adapters (by our names) of a file or folder in any of the formats.

    Raises ValueError for keys that name no layer, halves without the other, or several ranks.
    """
    from safetensors import safe_open

    file = adapter_file(path)
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata() or {}
        tensors = {key: content.get_tensor(key) for key in content.keys()}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        try:
            layer = from_diffusers(found[1]) if found else None
        except KeyError:
            layer = None
        if layer is None:
            raise ValueError(f"{file} holds {key}, which is no adapter of a layer of Qwen-Image")
        parts.setdefault(layer, {})[{"lora_down": "lora_A", "lora_up": "lora_B"}.get(found[2], found[2])] = tensor
    if broken := [layer for layer, p in parts.items() if not {"lora_A", "lora_B"} <= set(p)]:
        raise ValueError(f"{file}: the adapter of {broken[0]} lacks a half")
    return _config(file, metadata, parts), {layer: (p["lora_A"], p["lora_B"]) for layer, p in parts.items()}


def _config(file: Path, metadata: dict[str, str], parts: dict[str, dict[str, Tensor]]) -> LoRAConfig:
    """Settings from diffusers' metadata, PEFT's adapter_config.json or ComfyUI's alphas; else scale 1."""
    ranks = {len(p["lora_A"]) for p in parts.values()}
    alphas = {p["alpha"].item() for p in parts.values() if "alpha" in p}
    if len(ranks) != 1 or len(alphas) > 1:
        raise ValueError(
            f"{file} needs one rank and one alpha for all layers, has {sorted(ranks)} and {sorted(alphas)}"
        )
    (rank,) = ranks
    settings = {
        k.removeprefix("transformer."): v for k, v in json.loads(metadata.get("lora_adapter_metadata", "{}")).items()
    }
    if (record := file.with_name("adapter_config.json")).is_file():
        settings = json.loads(record.read_text())
    alpha = settings.get("lora_alpha", alphas.pop() if alphas else rank)
    return LoRAConfig(rank, float(alpha), settings.get("use_rslora", False), tuple(sorted(parts)))


def adapter_card(file: str, config: LoRAConfig, base: str, settings: dict, side_px: int) -> str:
    """Model card of adapters in `file`; `settings` are those of the run that trained them."""
    loop, engine = settings.get("loop", {}), settings.get("engine", {})
    told = {
        "rank, alpha": f"{config.rank}, {config.alpha:g}" + (", rank-stabilised" if config.rank_stabilised else ""),
        "layers": ", ".join(config.targets) if len(config.targets) < 20 else f"{len(config.targets)}",
        "pictures": f"of {side_px} x {side_px} pixels in area",
        "steps": loop.get("steps"),
        "samples a step": settings.get("batch_size"),
        "learning rate": engine.get("optimizer", {}).get("lr"),
        "seed": loop.get("seed"),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in told.items() if value is not None)
    return f"""---
base_model: {base}
library_name: diffusers
pipeline_tag: text-to-image
tags: [lora, qwen-image]
---

# LoRA for {base}

Trained with open-qwen-image.

| | |
|---|---|
{rows}

```python
import torch
from diffusers import QwenImagePipeline

pipe = QwenImagePipeline.from_pretrained("{base}", torch_dtype=torch.bfloat16)
pipe.load_lora_weights(".", weight_name="{file}")
pipe("your prompt", width={side_px}, height={side_px}).images[0].save("picture.png")
```
"""
