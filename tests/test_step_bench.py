"""bench/step.py: the engine and the loop around diffusers' model compute the same, and the bench says so if not."""

import json
import mmap
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench.gpu.measure import peak_mib
from bench.loops.accelerated import Accelerated
from bench.loops.ours import FullBatches
from bench.step import Config, compare
from data_pipeline.dataset import EncodedDataset
from data_pipeline.sample import EncodedSample, Fingerprint
from data_pipeline.shards import shard_name, write_encoded

SAMPLES, BATCH, WIDTH = 8, 2, 24


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pictures of two sizes, prompts of 3 to 17 tokens."""
    folder, generator = tmp_path_factory.mktemp("encoded"), torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    samples = [
        EncodedSample(
            f"k{i}",
            normal(16, 1, *((4, 6) if i % 2 else (8, 4))),
            normal(3 + 2 * i, WIDTH).bfloat16(),
            meta={"caption": ""},
        )
        for i in range(SAMPLES)
    ]
    write_encoded(folder / shard_name(0), samples)
    fingerprint = Fingerprint(vae="v", text_encoder="t", template="p", resolution=48)
    (folder / "dataset.json").write_text(json.dumps({"fingerprint": asdict(fingerprint)}))
    save_file({"txt": normal(2, WIDTH).bfloat16()}, folder / "empty.safetensors")
    return folder


@pytest.fixture
def config(data) -> Config:
    return Config(dtype="float32", batch=BATCH, accumulate=2, block=1, rounds=2, data=data, memory=False)


def test_both_train_on_the_same_with_equal_losses(config, capsys):
    found = compare(config)
    assert found["apart"] <= 1e-4 and 0 < found["quartiles"][0] <= found["ratio"] <= found["quartiles"][1]
    assert "tiny, float32, 1 x " in capsys.readouterr().out


def test_another_computation_is_refused(config, monkeypatch):
    collate = Accelerated.collate

    def unmasked(self, samples):
        return {name: value for name, value in collate(self, samples).items() if name != "mask"}

    monkeypatch.setattr(Accelerated, "collate", unmasked)
    with pytest.raises(ValueError, match="another computation"):
        compare(config)


def test_batches_are_of_one_size_and_an_epoch_has_each_sample_once(data):
    batches = FullBatches(EncodedDataset(data), BATCH)
    drawn = list(islice(batches, SAMPLES // BATCH * 2))
    assert all(len({batches.buckets[index] for index, _ in batch}) == 1 for batch in drawn)
    places = [place for batch in drawn for place in batch]
    assert sorted(places) == sorted((index, epoch) for index in range(SAMPLES) for epoch in range(2))
    assert list(islice(batches.places(None, None), len(places))) == [(*place, None) for place in places]


def test_peak_memory_is_what_work_takes():
    def work() -> None:
        with mmap.mmap(-1, 2**26) as pages:
            pages[:: mmap.PAGESIZE] = bytes(2**26 // mmap.PAGESIZE)

    assert 63 <= peak_mib(work) < 80
