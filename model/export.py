"""Export a run as a diffusers folder, which QwenImagePipeline.from_pretrained (or an edit pipeline) loads."""

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
    """A run folder (its last checkpoint is taken) or one of its checkpoints."""
    output: Path = Path("runs/quick/export")
    """The diffusers folder to write; an earlier export there is replaced."""
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

    source = look(config.checkpoint)
    if not source.is_ours:
        raise UserError(f"{config.checkpoint} is no run folder and no checkpoint in one")
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
        model_config, weights = whole_weights(config.checkpoint, config.ema)
        bar.update()
        write_pipeline(config.output, model_config, weights, components, config.pipeline, getattr(torch, config.dtype))
        bar.update()
    print(f"wrote {config.output}; load it with diffusers.{config.pipeline}.from_pretrained({str(config.output)!r})")


if __name__ == "__main__":
    run(main, Config)
