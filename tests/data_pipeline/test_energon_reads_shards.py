"""Our shards are plain webdataset: megatron-energon, which others train with, indexes and reads them unchanged."""

import json
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load

from data_pipeline.sample import EncodedSample
from data_pipeline.shards import write_encoded


def test_energon_reads_encoded_shards(tmp_path):
    from megatron.energon import Cooker, Sample, WorkerConfig, basic_sample_keys, get_loader, get_val_dataset, stateless
    from megatron.energon.flavors import BaseWebdatasetFactory
    from megatron.energon.task_encoder import DefaultTaskEncoder

    rng = torch.Generator().manual_seed(0)
    samples = [
        EncodedSample(
            key=f"s{i}",
            latent=torch.randn(16, 1, 8, 6, generator=rng),
            txt=torch.randn(5, 128, generator=rng).bfloat16(),
            meta={"caption": f"sample {i}"},
        )
        for i in range(6)
    ]
    for shard in range(2):
        write_encoded(tmp_path / f"shard-00000{shard}.tar", samples[3 * shard : 3 * shard + 3])
    BaseWebdatasetFactory.prepare_dataset(
        tmp_path, [p.name for p in sorted(tmp_path.glob("*.tar"))], split_parts_ratio=[("val", 1.0)], workers=1
    )
    meta = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset", "subflavors": {}}
    (tmp_path / ".nv-meta" / "dataset.yaml").write_text(json.dumps(meta))

    @dataclass
    class Encoded(Sample):
        latent: torch.Tensor

    @stateless
    def cook(sample: dict) -> Encoded:
        return Encoded(**basic_sample_keys(sample), latent=load(sample["safetensors"])["latent"])

    class Encoder(DefaultTaskEncoder):
        cookers = [Cooker(cook)]
        decoder = None

    worker = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_val_dataset(tmp_path, worker_config=worker, batch_size=None, task_encoder=Encoder())
    read = {s.__key__.split("/")[-1]: s.latent for s in get_loader(dataset)}
    assert sorted(read) == [s.key for s in samples]
    for s in samples:
        np.testing.assert_array_equal(read[s.key].numpy(), s.latent.numpy())
