from pathlib import Path

import pytest
import torch

from model.tiny_components import write_tiny_components
from vae.autoencoder import VAE
from vae.config import PRESETS


@pytest.fixture(scope="session")
def components(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A components folder: tiny tokenizer, text encoder, processor, scheduler and VAE."""
    folder = tmp_path_factory.mktemp("components")
    write_tiny_components(folder, seed=0)
    torch.manual_seed(0)
    VAE(PRESETS["tiny"]).save(folder)
    return folder
