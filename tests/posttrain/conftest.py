import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "pretrain"))  # worlds: functions run as ranks of a gloo world

from small_run import make_components, make_run
from worlds import run_world


@pytest.fixture(scope="session")
def components(tmp_path_factory) -> Path:
    """Tiny tokenizer, text encoder and VAE with random weights."""
    folder = tmp_path_factory.mktemp("components")
    make_components(folder)
    return folder


@pytest.fixture(scope="session")
def init(components, tmp_path_factory) -> Path:
    """A run of a small model, as an earlier stage leaves it."""
    folder = tmp_path_factory.mktemp("init")
    run_world(1, make_run, folder, components)
    return folder


@pytest.fixture
def one_process():
    """A world of one, for code that meets its peers at barriers."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
