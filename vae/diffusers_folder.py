"""VAE folders as diffusers writes them: config.json and diffusion_pytorch_model.safetensors."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vae.config import VAEConfig

CLASSES = ("AutoencoderKLQwenImage", "AutoencoderKLWan")
WEIGHTS = "diffusion_pytorch_model.safetensors"

REQUIRED = {
    "attn_scales": ([],),
    "dropout": (0, 0.0),
    "input_channels": (3,),
    "in_channels": (3,),
    "out_channels": (3,),
    "is_residual": (False,),
    "patch_size": (None,),
    "scale_factor_temporal": (4,),
    "scale_factor_spatial": (8,),
}
"""Options of the two classes that change the network, with the values that this one has."""


def read_vae_folder(folder: Path) -> tuple[VAEConfig, dict[str, Tensor]]:
    """Config and weights of an AutoencoderKLQwenImage or AutoencoderKLWan (2.1) folder; ValueError for another."""
    try:
        record = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / WEIGHTS)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from None
    if record.get("_class_name") not in CLASSES:
        raise ValueError(f"{folder} holds {record.get('_class_name')}, not {' or '.join(CLASSES)}")
    width = record.get("decoder_base_dim")
    for name, values in REQUIRED.items():
        if name in record and record[name] not in values:
            raise ValueError(f"{folder}: {name} = {record[name]} is another architecture than Wan 2.1's")
    if width not in (None, record.get("base_dim", VAEConfig.base_dim)):
        raise ValueError(f"{folder}: decoder_base_dim = {width} is another architecture than Wan 2.1's")
    known = {f.name for f in dataclasses.fields(VAEConfig)}
    return VAEConfig(**{n: v for n, v in record.items() if n in known}), weights


def write_vae_folder(folder: Path, class_name: str, config: VAEConfig, weights: dict[str, Tensor]) -> None:
    """Write such a folder; it appears, or replaces an older one, only when it is complete and on disk."""
    temporary = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    temporary.mkdir(parents=True)
    try:
        weights = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        record = {"_class_name": class_name, **dataclasses.asdict(config)}
        (temporary / "config.json").write_text(json.dumps(record, indent=2) + "\n")
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_weights(vae: nn.Module, weights: dict[str, Tensor], where: Path) -> None:
    """Load every weight of `vae`; ValueError naming the first one that is missing, unknown or of another shape."""
    wanted = {name: tuple(weight.shape) for name, weight in vae.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{where}: {name} is {found.get(name, 'missing')} in the file and {wanted.get(name, 'unknown')} in its "
                "config's architecture"
            )
    vae.load_state_dict(weights)
