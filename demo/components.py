"""Put a components folder together: tiny text encoder, tokenizer, scheduler, and a VAE; or copy one that is there.

A real Qwen-Image folder in diffusers layout is such a folder too.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

try:
    from command_line import UserError, run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

VAES = ("vae", "vae_video")
PARTS = ("tokenizer", "text_encoder", "processor", "scheduler")


@dataclass(frozen=True)
class Config:
    vae: Path = Path("runs/quick/image-decoder")
    """Folder that holds vae/ and vae_video/."""
    copy: Path | None = None
    """Take all parts from this components folder instead."""
    out: Path = Path("runs/quick/components")
    seed: int = 0
    """Seed of the text encoder's weights."""
    text_steps: int = 0
    """Steps that the text encoder is trained for on captions of the shapes world (300: it understands them). 0 leaves
    it random."""
    video: bool = True
    """Take the VAE's video decoder too."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in the files."""


def main(config: Config) -> None:
    source = config.copy or config.vae
    if not (source / "vae").is_dir():
        raise UserError(f"{source} holds no vae/; train one with `python vae/train.py --out {config.vae}`")
    if config.copy and (missing := [part for part in PARTS[:2] if not (source / part).is_dir()]):
        raise UserError(f"{source} holds no {' and no '.join(missing)}; --copy takes a whole components folder")
    others = [p.name for p in config.out.iterdir() if p.name not in (*VAES, *PARTS)] if config.out.is_dir() else []
    if others or config.copy and config.out.resolve() == config.copy.resolve():
        what = others[0] if others else "what --copy names"
        raise UserError(f"{config.out} holds {what}, which this would delete; choose another --out")
    temporary = config.out.with_name(f".tmp-{config.out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    if config.copy is None:
        make_text_encoder(config, temporary)
    for part in VAES if config.copy is None else (*VAES, *PARTS):
        if (source / part).is_dir() and (config.video or part != "vae_video"):
            shutil.copytree(source / part, temporary / part)
    if config.copy or config.dtype == "bfloat16":
        cast(temporary, config.dtype)
    shutil.rmtree(config.out, ignore_errors=True)
    os.replace(temporary, config.out)
    print(f"wrote {config.out}: {', '.join(sorted(p.name for p in config.out.iterdir()))}")


def make_text_encoder(config: Config, folder: Path) -> None:
    from model.tiny_components import write_tiny_components

    write_tiny_components(folder, config.seed)
    if config.text_steps:
        from demo.text_encoder import train_text_encoder

        train_text_encoder(folder, config.text_steps, config.seed)


def cast(folder: Path, dtype: str) -> None:
    """Store the floating-point weights of all parts of a folder as `dtype`: diffusers loads a part as it is stored."""
    import torch
    from safetensors.torch import load, save_file

    for path in folder.rglob("*.safetensors"):
        weights = load(path.read_bytes()).items()  # a mapped file must not be written over
        stored = {n: w.to(getattr(torch, dtype)) if w.is_floating_point() else w for n, w in weights}
        save_file(stored, path, {"format": "pt"})
    described = folder / "text_encoder" / "config.json"
    config = json.loads(described.read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        if "dtype" in part:
            part["dtype"] = dtype
    described.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    run(main, Config)
