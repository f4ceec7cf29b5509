"""The index of a data set of ten million samples: bytes on disk, seconds to open it and to the first batch, memory."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    from command_line import run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config:
    samples: int = 10_000_000
    shard: int = 1000
    """Samples of the one shard on disk, which stands for all."""


def make(folder: Path, config: Config) -> None:
    """A data set whose index has `samples` rows, in shards that are links to one."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from data_pipeline.sample import EncodedSample, Fingerprint
    from data_pipeline.sample_index import COLUMNS, INDEX, SCORE, Table, _stamp, _write, shard_table
    from data_pipeline.shards import shard_name, write_encoded

    first = folder / shard_name(0)
    samples = [
        EncodedSample(
            f"square-shapes-5-{i:08d}", torch.randn(16, 1, 8, 8), torch.zeros(14, 128).bfloat16(),
            meta={"caption": "a red circle", "scores": dict.fromkeys("abcd", 0.5)},
        )
        for i in range(config.shard)
    ]  # fmt: skip
    write_encoded(first, samples)
    count = config.samples // config.shard
    for i in range(1, count):
        os.link(first, folder / shard_name(i))
    one = shard_table(first)
    columns = {name: np.tile(one.columns[name], count) for name in (*COLUMNS, *(c for c in one.columns if SCORE in c))}
    columns["shard"] = np.repeat(np.arange(count, dtype=np.uint32), config.shard)
    names = tuple(shard_name(i) for i in range(count))
    _write(folder / INDEX, Table(names, columns), [[name, *_stamp(first)] for name in names])
    (folder / "dataset.json").write_text(json.dumps({"fingerprint": asdict(Fingerprint("v", "t", "p", 64))}))
    save_file({"txt": torch.zeros(2, 128).bfloat16()}, folder / "empty.safetensors")


def measure(folder: Path) -> None:
    """In a fresh process: open, first batch, memory beyond the imports."""
    import torch  # noqa: F401

    from data_pipeline.dataset import EncodedDataset
    from data_pipeline.loader import Loader

    before, begin = resident_mib(), time.perf_counter()
    dataset = EncodedDataset(folder)
    opened = time.perf_counter() - begin
    loader = Loader(dataset, 1024, seed=1)
    next(loader)
    first = time.perf_counter() - begin
    for _ in range(20):
        next(loader)
    loader.close()
    grown = resident_mib() - before
    size = (folder / "index.safetensors").stat().st_size / len(dataset)
    print(
        f"{len(dataset):,} samples: {size:.1f} bytes each on disk, opened in {opened:.2f} s, first batch after "
        f"{first:.2f} s, {grown:.0f} MiB after 21 batches"
    )


def resident_mib() -> float:
    """Resident memory of this process, pages that it shares included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), config)
        subprocess.run([sys.executable, __file__, "--measure", folder], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]))
    else:
        run(main, Config)
