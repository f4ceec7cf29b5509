"""The two trainings of the VAE as data. Imports no torch.

`base` learns the encoder and a decoder on pictures and clips together (Wan 2.1). `image-decoder` freezes the encoder
and fine-tunes a decoder for pictures on text-rich ones, without a GAN (Qwen-Image report, section 2.2); the decoder
that it started from stays the video decoder. The reports give no batch sizes or learning rates; those here are ours.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from pretrain.engine.config import EngineConfig, OptimizerConfig
from pretrain.loop import LoopConfig
from pretrain.recipes import has_gpu


@dataclass(frozen=True)
class Config:
    """One training."""

    recipe: Literal["base", "image-decoder"] = "base"
    preset: Literal["tiny", "qwen-image"] = "qwen-image"
    """Size of a VAE that starts at random. Default: qwen-image with a GPU, tiny without."""
    data: tuple[Path, ...] = ()
    """Folders of raw shards. Default: the demo's pictures, made if they are missing."""
    init: Path | None = None
    """Start from this VAE: a components folder, a diffusers VAE folder, or another run's. image-decoder needs one."""
    out: Path | None = None
    """Folder of the run, in which vae/ (and vae_video/) appear at the end. Default: runs/vae-RECIPE."""
    size: int = 256
    """Pictures are shrunk, at random, between not at all and to about the area of this square."""
    crop: int = 256
    """Side of the squares that are cut from them, in pixels (a multiple of 8)."""
    frames: int = 17
    """Frames of a clip, 4k + 1."""
    clip_share: float = 0.25
    """Share of clips among the samples; they are pictures set in motion."""
    batch_size: int = 64
    """Samples in a step, over all ranks."""
    max_frames: int = 32
    """Frames in a microbatch; a picture is one."""
    perceptual: str = "gradient-pyramid"
    """Perceptual distance: gradient-pyramid (edges; no weights), or with local weights lpips:FILE, convnext:FOLDER."""
    perceptual_ratio: float = 0.5
    """Weight of the perceptual term relative to the reconstruction term, held at every moment."""
    kl_weight: float = 1e-6
    sample_every: int = 500
    """Steps between pictures of reconstructions in samples/."""
    statistics_samples: int = 1024
    """Pictures that the latent mean and std are measured on, for a VAE trained from scratch."""
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = field(default_factory=LoopConfig)
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)
    dry_run: bool = False
    """Print what would be trained on what."""

    def __post_init__(self):
        if self.crop < 8 or self.crop % 8:
            raise ValueError(f"--crop must be a multiple of 8, not {self.crop}")
        if self.size < self.crop:
            raise ValueError(f"--size {self.size} is less than --crop {self.crop}")
        if self.frames < 1 or self.frames % 4 != 1:
            raise ValueError(f"--frames must be 4k + 1, not {self.frames}")
        if not 0 <= self.clip_share < 1:
            raise ValueError(f"--clip-share lies in [0, 1), not {self.clip_share}")


def _engine(lr: float, warmup: int, ema: float) -> EngineConfig:
    optimizer = OptimizerConfig(lr, (0.9, 0.99), weight_decay=0.0, warmup_steps=warmup, schedule="cosine")
    return EngineConfig(optimizer=optimizer, dtype="float32", ema_decay=ema)


RECIPES: dict[tuple[str, str], Config] = {
    ("base", "qwen-image"): Config(engine=_engine(1e-4, 1000, 0.999), loop=LoopConfig(300_000, save_every=2000)),
    ("image-decoder", "qwen-image"): Config(
        "image-decoder", clip_share=0.0, frames=1, engine=_engine(5e-5, 500, 0.999), loop=LoopConfig(50_000, 1000)
    ),
}
for _name in ("base", "image-decoder"):
    RECIPES[_name, "tiny"] = replace(
        RECIPES[_name, "qwen-image"],
        preset="tiny", size=64, crop=32, frames=min(5, RECIPES[_name, "qwen-image"].frames), batch_size=16,
        sample_every=200, statistics_samples=256, engine=_engine(3e-3, 20, 0.98), loop=LoopConfig(400, 200),
    )  # fmt: skip


def recipe(name: str, preset: str | None = None) -> Config:
    """The recipe for a preset, by default what this machine can train. ValueError for an unknown one."""
    preset = preset or ("qwen-image" if has_gpu() else "tiny")
    if (name, preset) not in RECIPES:
        raise ValueError(
            f"there is no recipe {name} of preset {preset}; there are base and image-decoder, tiny and qwen-image"
        )
    return RECIPES[name, preset]
