"""Encode raw shards for training: pictures to VAE latents in aspect-ratio buckets, captions to text-encoder states.

Run it again to go on: a finished shard is not made twice. Under torchrun each process takes its share of the shards.
The folder becomes an encoded data set (by its dataset.json) when the last shard is finished.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    from command_line import UserError, progress, run
    from data_pipeline.buckets import buckets
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config:
    data: Path = Path("runs/quick/data/curated")
    """Folder of raw shards."""
    components: Path = Path("runs/quick/components")
    """Folder with tokenizer/, text_encoder/ and vae/, as diffusers writes it."""
    out: Path = Path("runs/quick/data/encoded-256")
    """Folder for the encoded shards."""
    res: int = 64
    """Side, in pixels, of the square whose area pictures are resized to; a multiple of 16."""
    batch_size: int = 16
    """Pictures encoded at once."""
    decode_threads: int = 2
    dry_run: bool = False
    """Say what would be done, do nothing."""


def main(config: Config) -> None:
    sizes = buckets(config.res)
    for folder, what in ((config.data, "--data"), (config.components, "--components")):
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist; give {what}, or make the demo's with `make quick`")
    from data_pipeline.shard_stage import ShardStage, say_skipped, shards_as_inputs

    inputs = shards_as_inputs(config.data, config.out)
    if config.dry_run:
        print(f"{len(inputs)} shards of {config.data} -> {config.out}")
        print("buckets (width x height): " + ", ".join(f"{w}x{h}" for w, h in dict.fromkeys(sizes)))
        return

    encoder = load_encoder(config)
    fingerprint = encoder.fingerprint()
    stage = ShardStage(config.out, inputs, asdict(fingerprint) | {"batch_size": config.batch_size})
    config.out.mkdir(parents=True, exist_ok=True)
    require_same(config.out, fingerprint)
    encode_shards(stage, stage.my_pending(), config.data, encoder)
    records = stage.records()
    say_skipped(records, config.out)
    samples = sum(record["samples"] for record in records)
    if len(records) == len(inputs):
        if not samples:
            raise UserError(f"no sample of {config.data} could be encoded")
        encoder.write_description(config.out)
    print(f"{samples} samples in {stage.progress(records)}: {config.out}")


def load_encoder(config: Config):
    """The networks on this process's GPU (text encoder in bf16), or on the CPU in fp32."""
    import torch

    from data_pipeline.encoding import Encoder
    from model.conditioner import Conditioner
    from vae.autoencoder import VAE

    cuda = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    conditioner = Conditioner.from_folder(config.components, device, torch.bfloat16 if cuda else torch.float32)
    vae = VAE.from_folder(config.components, device)
    return Encoder(conditioner, vae, config.res, config.batch_size, config.decode_threads)


def require_same(out: Path, fingerprint) -> None:
    """UserError if `out` is an encoded data set already, and not of these components and this resolution."""
    from data_pipeline.loader import read_fingerprint

    if (out / "dataset.json").exists():
        try:
            fingerprint.require(read_fingerprint(out), str(out))
        except ValueError as error:
            raise UserError(f"{error}: delete the folder or choose another --out") from None


def encode_shards(stage, names: list[str], data: Path, encoder) -> None:
    """Encode shards of `data`, with a progress bar over their samples."""
    from data_pipeline.shards import Problem
    from data_pipeline.tar_index import tar_index

    if not names:
        return
    counts = {name: len(tar_index(data / name).entries) for name in names}
    with progress(sum(counts.values()), f"produce {stage.out.name}", "sample") as bar:
        for name in names:
            problems: list[Problem] = []
            n = encoder.encode_shard(data / name, stage.target(name), problems.append, bar.update)
            bar.update(counts[name] - n)
            stage.finish(name, {"samples": n, "skipped": [asdict(p) for p in problems]})


if __name__ == "__main__":
    run(main, Config)
