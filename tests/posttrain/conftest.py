import multiprocessing
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "pretrain"))  # worlds: functions run as ranks of a gloo world

from small_run import make_components, make_run  # noqa: E402
from worlds import run_world  # noqa: E402

# What an entry imports, imported once: the processes of a world are forked from one that has it.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    [
        "torch.utils.tensorboard",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        "pretrain.engine.step",
        "pretrain.samples",
        "posttrain.objectives",
        "posttrain.rewards.shapes",
    ]
)


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
    run_world(1, make_run, folder, components, deadline_s=400)
    return folder


@pytest.fixture
def one_process():
    """A world of one, for code that meets its peers at barriers."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
