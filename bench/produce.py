"""Producing: CPU time per picture outside the networks against the bare minimum, and where the rest of the time goes.

bare      decode a JPEG, cut and resize it to its bucket, write as many bytes as an encoded sample has, fsync
produce   what data_pipeline/produce.py does, with networks that answer at once: reading, checks, threads, shards, index

Both run alternately, after a first round that isn't counted; CPU milliseconds of all threads per picture, medians over
rounds with the range of their ratio. Then one run with the shipped base's networks, in parts.
"""

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

try:
    from command_line import run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config:
    pictures: int = 64
    sides: tuple[int, ...] = (256, 640, 1328)
    oversize: float = 1.5
    """Pictures come this many times larger than their bucket."""
    rounds: int = 5


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for side in config.sides:
            raw = make_pictures(Path(folder) / f"raw-{side}", config, side)
            cases = {"bare": lambda raw=raw, side=side: bare(raw, side), "produce": lambda r=raw, s=side: produce(r, s)}
            rounds = [
                {name: cpu_ms(case) / config.pictures for name, case in cases.items()} for _ in range(config.rounds + 1)
            ]
            ratios = [r["produce"] / r["bare"] for r in rounds[1:]]
            medians = {name: statistics.median(r[name] for r in rounds[1:]) for name in cases}
            print(
                f"{side} px: bare {medians['bare']:.2f} ms, produce {medians['produce']:.2f} ms a picture, "
                f"{statistics.median(ratios):.2f} x ({min(ratios):.2f}-{max(ratios):.2f})"
            )
        parts(Path(folder) / f"raw-{config.sides[0]}", config)


def make_pictures(folder: Path, config: Config, side: int) -> Path:
    """JPEGs of crops of a photograph, in one shard."""
    import numpy as np
    import skimage.data
    from PIL import Image

    from data_pipeline.sample import RawSample
    from data_pipeline.shards import shard_name, write_raw

    rng, photo = np.random.default_rng(0), Image.fromarray(skimage.data.astronaut())
    samples = []
    for i in range(config.pictures):
        ratio = float(rng.uniform(0.6, 1.7))
        size = round(config.oversize * side * ratio**0.5), round(config.oversize * side / ratio**0.5)
        file = io.BytesIO()
        photo.rotate(float(rng.uniform(0, 360))).resize(size).save(file, "JPEG", quality=90)
        meta = {"caption": f"an astronaut, turned {i}", "source": "photo", "width": size[0], "height": size[1]}
        samples.append(RawSample(f"astronaut-{i:04d}", file.getvalue(), "jpg", meta))
    folder.mkdir()
    write_raw(folder / shard_name(0), samples)
    return folder


def cpu_ms(case: Callable[[], None]) -> float:
    begin = time.process_time()
    case()
    return 1000 * (time.process_time() - begin)


def bare(raw: Path, side: int) -> None:
    import numpy as np
    import webdataset
    from PIL import Image

    from data_pipeline.buckets import centre_crop, choose_bucket

    with tempfile.NamedTemporaryFile() as out:
        for sample in webdataset.WebDataset(str(raw / "shard-000000.tar"), shardshuffle=False):
            picture = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
            size = choose_bucket(*picture.size, side)
            box = centre_crop(*picture.size, size)
            pixels = np.asarray(picture.resize(size, Image.Resampling.LANCZOS, box=box))
            out.write(bytes(4 * 16 * (pixels.shape[0] // 8) * (pixels.shape[1] // 8) + 2 * 14 * 128))
        out.flush()
        os.fsync(out.fileno())


class NoVAE:
    """Latents of zeros, at once, on a device that costs nothing; as on a GPU, the network's input is made there."""

    def parameters(self) -> Iterator:
        import torch

        return iter([torch.zeros(1, device="meta")])

    def encode_latent(self, pixels):
        import torch

        return torch.zeros(1).expand(len(pixels), 16, 1, pixels.shape[-2] // 8, pixels.shape[-1] // 8)


class NoConditioner:
    """States of zeros, at once."""

    picture_area = 384 * 384

    def require(self, caption: str, references: int) -> None:
        pass

    def encode(self, prompts, pictures=None):
        import torch

        return [torch.zeros(1).expand(14, 128) for _ in prompts]


def produce(raw: Path, side: int) -> None:
    from data_pipeline.encoding import Encoder

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "shard-000000.tar"
        encoder = Encoder(NoConditioner(), NoVAE(), side, decode_threads=1)  # two would share a core and each seem slow
        encoder.encode_shard(raw / out.name, out, print, lambda n: None)


def parts(raw: Path, config: Config) -> None:
    """Tar read, decode and resize, text encoder, VAE, write, of the base's networks; and end to end."""
    import torch

    from data_pipeline.encoding import Encoder
    from data_pipeline.shards import read_raw
    from model.conditioner import Conditioner
    from training.source import BASE
    from vae.autoencoder import VAE

    torch.set_num_threads(1)
    side, source = config.sides[0], raw / "shard-000000.tar"
    encoder = Encoder(Conditioner.from_folder(BASE), VAE.from_folder(BASE), side, decode_threads=1)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.tar"
        whole = cpu_ms(lambda: encoder.encode_shard(source, target, print, lambda n: None))
        without_vae = cpu_ms(lambda: replace(encoder, vae=NoVAE()).encode_shard(source, target, print, lambda n: None))
        neither = cpu_ms(
            lambda: replace(encoder, vae=NoVAE(), conditioner=NoConditioner()).encode_shard(
                source, target, print, lambda n: None
            )
        )
    samples = []
    read = cpu_ms(lambda: samples.extend(read_raw(source)))
    fit = cpu_ms(lambda: [encoder._fit(sample) for sample in samples])
    found = {
        "tar read": read,
        "decode, cut, resize": fit,
        "text encoder": without_vae - neither,
        "VAE": whole - without_vae,
        "write and the rest": neither - read - fit,
        "end to end": whole,
    }
    print(f"{side} px, the base's networks, one thread, CPU ms a picture: ", end="")
    print(", ".join(f"{name} {ms / config.pictures:.2f}" for name, ms in found.items()))


if __name__ == "__main__":
    run(main, Config)
