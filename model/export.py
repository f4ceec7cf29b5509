"""Export a run as a diffusers folder, which QwenImagePipeline.from_pretrained (or an edit pipeline) loads, or, of a run
that trained adapters, as a LoRA file, which load_lora_weights and ComfyUI load."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

try:
    from command_line import UserError, progress, run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config:
    checkpoint: Path = Path("runs/quick/grpo")
    """A run folder (its last checkpoint is taken), one of its checkpoints, or adapters."""
    output: Path = Path("runs/quick/export")
    """The folder to write; an earlier export there is replaced."""
    lora: Literal["no", "diffusers", "peft", "comfyui"] = "no"
    """Write the adapters alone, in this format, instead of the whole model with them merged in."""
    base: Path | None = None
    """Model that the adapters of --checkpoint belong to, for files that don't say."""
    components: Path | None = None
    """Folder with tokenizer/, text_encoder/, vae/ and scheduler/ (default: the one that the run was trained with)."""
    pipeline: Literal["QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"] = "QwenImagePipeline"
    ema: bool = True
    """Export the averaged weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    dry_run: bool = False
    """Say what would be written, and stop."""


def main(config: Config) -> None:
    from training.source import look

    source = look(config.checkpoint, config.base)
    if not source.is_ours and source.lora is None:
        raise UserError(f"{config.checkpoint} is no run folder, no checkpoint in one and no LoRA")
    if config.lora != "no":
        return export_adapters(config, source)
    components = config.components or source.components()
    kind = f"{'averaged' if config.ema else 'raw'} weights, {config.dtype}"
    print(f"{config.checkpoint} ({kind}) + {components} -> {config.output}")
    if config.dry_run:
        return

    import torch

    from model.diffusers_io.folder import write_pipeline
    from training.encoded_with import require_encoded_with
    from training.loading import whole_weights

    try:
        require_encoded_with(components, source.settings.get("data", ()))
    except ValueError as error:
        print(f"warning: {error}", file=sys.stderr)

    with progress(2, "export", "step") as bar:
        model_config, weights = whole_weights(source, config.ema)
        bar.update()
        write_pipeline(config.output, model_config, weights, components, config.pipeline, getattr(torch, config.dtype))
        bar.update()
    print(f"wrote {config.output}; load it with diffusers.{config.pipeline}.from_pretrained({str(config.output)!r})")


def export_adapters(config: Config, source) -> None:
    """Write a run's adapters with a card beside them."""
    if source.lora is None:
        raise UserError(f"{config.checkpoint} trained all weights, not adapters: leave out --lora")
    base = str(source.base.hub_id or source.base.path)
    print(f"{config.checkpoint} (adapters of rank {source.lora.rank} on {base}) -> {config.output}, for {config.lora}")
    if config.dry_run:
        return

    import torch

    from files import atomic_file
    from model.diffusers_io.lora_files import adapter_card, write_adapters
    from training.loading import adapters

    if config.output.exists() and not config.output.is_dir():
        raise UserError(f"{config.output} is a file; --output names a folder")
    dtype = getattr(torch, config.dtype)
    found = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in adapters(source, config.ema).items()}
    path = config.output / "lora-comfyui.safetensors" if config.lora == "comfyui" else config.output
    file = write_adapters(path, found, source.lora, config.lora, base)
    with atomic_file(config.output / "README.md") as card:
        card.write(adapter_card(file.name, source.lora, base, source.settings, source.side_px()).encode())
    print(f"wrote {file}; load it with pipe.load_lora_weights({str(config.output)!r}), or into ComfyUI's models/loras")


if __name__ == "__main__":
    run(main, Config)
