"""Diffusers folders: read a transformer into our MMDiT, write a whole pipeline from ours.

Weights are read tensor by tensor straight into the parameters (into this rank's slice of them), and written in shards
with the index that diffusers reads. Nothing is unpickled.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from model.config import MMDiTConfig
from model.diffusers_io.config import UNSUPPORTED
from model.diffusers_io.names import from_diffusers, to_diffusers
from model.ops import fill_weight

WEIGHTS = "diffusion_pytorch_model"
COMPONENTS = ("tokenizer", "text_encoder", "vae", "vae_video", "processor", "scheduler")
Pipeline = Literal["QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"]

_CLASSES = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration"),
    "tokenizer": ("transformers", "Qwen2Tokenizer"),
    "transformer": ("diffusers", "QwenImageTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKLQwenImage"),
}


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(our name, whole tensor as stored) of each weight of `folder`/transformer, one in memory at a time."""
    from safetensors import safe_open

    files = sorted((Path(folder) / "transformer").glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}/transformer holds no .safetensors")
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():
                try:
                    ours = from_diffusers(name)
                except KeyError:
                    raise ValueError(f"{file} holds {name}, which Qwen-Image does not have") from None
                yield ours, weights.get_tensor(name)


@torch.no_grad()
def load_transformer(folder: Path, model: nn.Module) -> None:
    """Fill an MMDiT, or this rank's slice of one, from `folder`. ValueError names a weight that is missing or odd."""
    missing = dict(model.named_parameters())
    for name, full in read_weights(folder):
        if name not in missing:
            raise ValueError(f"{folder} holds {to_diffusers(name)}, which this config does not have")
        missing.pop(name)
        try:
            fill_weight(model, name, full)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{folder}: {to_diffusers(name)} does not fit: {error}") from None
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights, first {to_diffusers(next(iter(missing)))}")


def write_pipeline(
    output: Path,
    config: MMDiTConfig,
    weights: dict[str, Tensor],
    components: Path,
    pipeline: Pipeline = "QwenImagePipeline",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write the folder `output` that `pipeline.from_pretrained` loads: our weights, the components copied.

    `weights` by our names, whole; `dtype` casts them. The folder appears when it is complete. ValueError if `output`
    exists and is no earlier export, or a component is missing.
    """
    output = Path(output)
    if output.exists() and not (output / "model_index.json").is_file():
        raise ValueError(f"{output} exists and is no diffusers folder; choose another output")
    if config.rope != "msrope":
        raise ValueError(f"diffusers' transformer has no {config.rope} positions; only msrope models can be exported")
    parts = dict(_CLASSES)
    if pipeline != "QwenImagePipeline":
        parts["processor"] = ("transformers", "Qwen2VLProcessor")
    for part in parts:
        if part != "transformer" and not (Path(components) / part).is_dir():
            raise ValueError(f"{components} has no {part}/, which {pipeline} needs")
    temporary = output.with_name(f".tmp-{os.getpid()}-{output.name}")
    try:
        for part in COMPONENTS:
            if (Path(components) / part).is_dir():
                shutil.copytree(Path(components) / part, temporary / part)
        _write_transformer(temporary / "transformer", config, weights, dtype, max_shard_bytes)
        index = {"_class_name": pipeline, "_diffusers_version": "0.42.1", **{k: list(parts[k]) for k in sorted(parts)}}
        _write_json(temporary / "model_index.json", index)
        for file in temporary.rglob("*"):
            _sync(file)
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
        _sync(output.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_transformer(
    folder: Path, config: MMDiTConfig, weights: dict[str, Tensor], dtype: torch.dtype | None, max_shard_bytes: int
) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    shape = {name: value for name, value in asdict(config).items() if name != "rope"}
    values = {"_class_name": "QwenImageTransformer2DModel", "_diffusers_version": "0.42.1", **shape}
    _write_json(folder / "config.json", {**values, **dict.fromkeys(UNSUPPORTED, False)})

    size = lambda t: t.numel() * (dtype or t.dtype).itemsize  # noqa: E731
    shards: list[list[str]] = [[]]
    used = 0
    for name in sorted(weights):
        if shards[-1] and used + size(weights[name]) > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size(weights[name])
    where = {}
    for i, names in enumerate(shards):
        file = f"{WEIGHTS}.safetensors" if len(shards) == 1 else f"{WEIGHTS}-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {to_diffusers(n): weights[n].detach().to("cpu", dtype).contiguous() for n in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = {"total_size": sum(map(size, weights.values()))}
        _write_json(folder / f"{WEIGHTS}.safetensors.index.json", {"metadata": total, "weight_map": where})


def _write_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
