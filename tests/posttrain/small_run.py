"""A small model's run and components to post-train, and the entries as functions that a world's ranks call."""

import importlib
import os
from dataclasses import replace
from pathlib import Path

import torch

from model.config import MMDiTConfig
from training.engine.config import EngineConfig, OptimizerConfig
from training.start import main

CONFIG = MMDiTConfig(2, 2, 16, joint_attention_dim=128, axes_dims_rope=(4, 6, 6))
SIZE_PX = 32


def make_components(folder: Path) -> None:
    from model.tiny_components import write_tiny_components
    from vae.autoencoder import VAE
    from vae.config import PRESETS

    write_tiny_components(folder)
    torch.manual_seed(0)
    VAE(PRESETS["tiny"]).save(folder)


def random_weights(names_and_params, scale: float = 0.1, seed: int = 0):
    """Weights that no initialisation has set to zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in names_and_params:
        yield name, torch.randn(p.shape, generator=generator) * scale


def make_run(rank: int, folder: Path, components: Path) -> None:
    from command_line import write_toml
    from data_pipeline.sample import EncodedSample
    from posttrain.flow_grpo import Config
    from training.engine.step import Engine
    from training.flow_matching import VelocityMSE
    from training.randomness import Randomness

    engine = Engine(CONFIG, EngineConfig(optimizer=OptimizerConfig(lr=0.0)), 1)
    engine.load_weights(random_weights(engine.model.named_parameters()))
    write_toml(Config(components=components, size_px=SIZE_PX, out=folder), folder / "config.toml")
    sample = EncodedSample("k", torch.zeros(16, 1, 4, 4), torch.zeros(3, CONFIG.joint_attention_dim))
    engine.step(VelocityMSE(condition_dropout=0.0), [[sample]], Randomness(0))  # the optimizer has no state before
    engine.save_step(folder / "checkpoints", {}, 1)
    engine.close()


def run_entry(rank: int, name: str, steps: int, save_every: int, lr: float = 1e-3, **settings) -> None:
    """`python posttrain/NAME.py` with these settings."""
    os.environ["RANK"] = str(rank)
    entry = importlib.import_module(f"posttrain.{name}")
    (trainer,) = (c for n, c in vars(entry).items() if n.lower().endswith(name.replace("_", "")))
    engine = replace(
        settings.pop("engine", EngineConfig()), optimizer=OptimizerConfig(lr=lr, warmup_steps=0), ema_decay=0.9
    )
    config = replace(entry.Config.recipe(CONFIG), **{"validate_every": 0, **settings}, engine=engine)
    main(replace(config, loop=replace(config.loop, steps=steps, save_every=save_every)), trainer)
