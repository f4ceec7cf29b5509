"""What a run starts from: random weights, another run's average, or a Qwen-Image diffusers folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from model.config import MMDiTConfig

if TYPE_CHECKING:
    from training.engine.step import Engine


def is_run(source: Path) -> bool:
    """Whether a path is a run folder or a checkpoint of ours."""
    return any((Path(source) / name).exists() for name in ("checkpoints", "state.json"))


def read_model_config(source: Path) -> MMDiTConfig:
    """Config of the model in a run, a checkpoint, a diffusers folder or a hub repository. ValueError if it is none."""
    if is_run(source):
        from training.engine.checkpoint import read_state, resolve

        return MMDiTConfig(**read_state(resolve(source))["model"])
    from model.diffusers_io.folder import locate, read_config

    return read_config(locate(source))


def fill_weights(engine: "Engine", source: Path | None, seed: int = 0) -> None:
    """Fill the engine's weights from `source`, at random if it is None. ValueError if it holds another model."""
    if source is None:
        engine.initialize(seed)
    elif is_run(source):
        engine.load_run(source)
    else:
        from model.diffusers_io.folder import locate, read_config, read_weights

        if (there := read_config(locate(source))) != engine.model_config:
            raise ValueError(f"{source} holds another model: {there}; this run's is {engine.model_config}")
        engine.load_weights(read_weights(locate(source)))
