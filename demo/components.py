"""Put a components folder together for the demo: tiny text encoder, tokenizer, scheduler, and the VAE just trained.

A real Qwen-Image folder in diffusers layout is such a folder too.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

try:
    from command_line import UserError, run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config:
    vae: Path = Path("runs/quick/image-decoder")
    """Folder that holds vae/ and vae_video/."""
    out: Path = Path("runs/quick/components")
    seed: int = 0
    """Seed of the text encoder's weights."""
    text_steps: int = 0
    """Steps that the text encoder is trained for on captions of the shapes world (300: it understands them). 0 leaves
    it random."""


def main(config: Config) -> None:
    if not (config.vae / "vae").is_dir():
        raise UserError(f"{config.vae} holds no vae/; train one with `python vae/train.py --out {config.vae}`")
    from model.tiny_components import write_tiny_components

    temporary = config.out.with_name(f".tmp-{config.out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    write_tiny_components(temporary, config.seed)
    if config.text_steps:
        from demo.text_encoder import train_text_encoder

        train_text_encoder(temporary, config.text_steps, config.seed)
    for part in ("vae", "vae_video"):
        if (config.vae / part).is_dir():
            shutil.copytree(config.vae / part, temporary / part)
    shutil.rmtree(config.out, ignore_errors=True)
    os.replace(temporary, config.out)
    print(f"wrote {config.out}: {', '.join(sorted(p.name for p in config.out.iterdir()))}")


if __name__ == "__main__":
    run(main, Config)
