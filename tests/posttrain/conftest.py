import multiprocessing
from pathlib import Path

import pytest
from small_run import make_components, make_run
from worlds import run_world

# What an entry imports, imported once: the processes of a world are forked from one that has it.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    [
        "torch.utils.tensorboard",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        "training.engine.step",
        "training.hooks",
        "posttrain.flow_grpo",
        "rewards.shapes",
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
def make_pictures():
    """make_pictures(folder, shards, each): raw shards of pictures of noise."""

    def make(folder: Path, shards: int, each: int) -> Path:
        import io

        import numpy as np
        from PIL import Image

        from data_pipeline.sample import RawSample
        from data_pipeline.shards import shard_name, write_raw

        folder.mkdir()
        rng = np.random.default_rng(0)
        for shard in range(shards):
            samples = []
            for i in range(each):
                file = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (48, 40 + 8 * (i % 3), 3), np.uint8)).save(file, "PNG")
                samples.append(RawSample(f"k{shard}-{i}", file.getvalue(), "png", {"caption": f"noise {i}"}))
            write_raw(folder / shard_name(shard), samples)
        return folder

    return make


@pytest.fixture
def one_process():
    """A world of one, for code that meets its peers at barriers."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
