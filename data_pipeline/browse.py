"""Show shards, raw or encoded, as one self-contained page of pictures with their captions.

Latents are decoded with --components; without, their first three channels stand for red, green and blue.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from command_line import UserError, run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from data_pipeline.tar_index import Entry


@dataclass(frozen=True)
class Config:
    data: Path = Path("runs/quick/data/raw")
    """A shard, or a folder of shards."""
    components: Path | None = None
    """Folder with the vae/ that decodes latents."""
    out: Path | None = None
    """The page; default browse.html in the folder of the shards."""
    count: int = 64
    """Samples to show, drawn at random."""
    seed: int = 0
    side: int = 208
    """Longest side of a picture on the page, in pixels."""
    boxes: bool = False
    """Outline the lines of text that the records tell of."""


def main(config: Config) -> None:
    from data_pipeline.page import render
    from data_pipeline.shards import list_shards
    from data_pipeline.tar_index import tar_index
    from files import atomic_file

    shards = [config.data] if config.data.is_file() else list_shards(config.data)
    indices = [(shard, tar_index(shard)) for shard in shards]
    for shard, index in indices:
        if index.problem:
            print(f"{shard}: {index.problem}")
    entries = [(shard, entry) for shard, index in indices for entry in index.entries if "json" in entry.members]
    if not entries:
        raise UserError(f"{config.data} holds no samples")
    decode = latent_decoder(config.components)
    cards = [card(shard, entry, config, decode) for shard, entry in draw(entries, config.count, config.seed)]
    sources = Counter(c["source"] for c in cards)
    summary = f"{len(cards)} of {len(entries)} samples in {len(shards)} shards: " + ", ".join(
        f"{n} {source}" for source, n in sources.most_common()
    )
    out = config.out or (config.data.parent if config.data.is_file() else config.data) / "browse.html"
    with atomic_file(out) as file:
        file.write(render("browse.html", title=config.data.name, summary=summary, cards=cards, side=config.side))
    print(f"{summary}: {out}")


def draw(entries: list, count: int, seed: int) -> list:
    """`count` of the entries, chosen by a hash of seed and key, in the data's order."""
    rank = lambda i: hashlib.blake2b(f"{seed}/{entries[i][1].key}".encode(), digest_size=8).digest()  # noqa: E731
    return [entries[i] for i in sorted(sorted(range(len(entries)), key=rank)[:count])]


def card(shard: Path, entry: "Entry", config: Config, decode: Callable[["Tensor"], "np.ndarray"]) -> dict[str, Any]:
    """What the page shows of one sample; a damaged one shows what is wrong."""
    from data_pipeline.page import picture_uri
    from data_pipeline.tar_index import read_member

    with open(shard, "rb") as file:
        members = {ext: read_member(file.fileno(), entry, ext) for ext in entry.members}
    try:
        meta = json.loads(members["json"])
        picture, facts = encoded(entry.key, members, decode) if "safetensors" in members else raw(members)
    except ValueError as error:
        return {"key": entry.key, "source": "damaged", "problem": str(error), "scores": {}}
    if config.boxes:
        picture = outlined(picture, meta.get("lines", []))
    source = meta.get("source", "unknown")
    return {
        "key": entry.key,
        "source": source,
        "caption": meta.get("caption", ""),
        "facts": f"{source} · {facts}",
        "scores": meta.get("scores", {}),
        "picture": picture_uri(picture, config.side),
    }


def raw(members: dict[str, bytes]) -> tuple["Image", str]:
    """Picture and size of a raw sample; ValueError if it has none that can be decoded."""
    from data_pipeline.pictures import decode
    from data_pipeline.shards import IMAGE_EXTENSIONS

    ext = next((x for x in IMAGE_EXTENSIONS if x in members), None)
    if ext is None:
        raise ValueError("no picture")
    picture = decode(members[ext])
    return picture, f"{picture.width} x {picture.height}"


def encoded(key: str, members: dict[str, bytes], decode: Callable[["Tensor"], "np.ndarray"]) -> tuple["Image", str]:
    """Picture and sizes of an encoded sample; ValueError if it is broken."""
    from PIL import Image

    from data_pipeline.shards import encoded_sample

    sample = encoded_sample(key, members["safetensors"], members.get("json"))
    channels, frames, height, width = sample.latent.shape
    facts = f"latent {channels} x {frames} x {height} x {width}, {len(sample.txt)} text tokens"
    return Image.fromarray(decode(sample.latent)), facts


def latent_decoder(components: Path | None) -> Callable[["Tensor"], "np.ndarray"]:
    """A function from a latent [16, F, h, w] to the first frame's pixels, uint8 [8h, 8w, 3]."""
    import torch

    def to_bytes(pixels: "Tensor") -> "np.ndarray":
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()

    def colours(latent: "Tensor") -> "np.ndarray":
        x = latent[:3, 0]
        x = (x - x.mean((1, 2), keepdim=True)) / (2 * x.std((1, 2), keepdim=True) + 1e-6)
        return to_bytes(x.repeat_interleave(8, 1).repeat_interleave(8, 2))

    if components is None:
        return colours
    from vae.autoencoder import VAE

    vae = VAE.from_folder(components, "cuda" if torch.cuda.is_available() else "cpu")
    device = next(vae.parameters()).device
    return lambda latent: to_bytes(vae.decode_latent(latent[None, :, :1].to(device))[0, :, 0].float().cpu())


def outlined(picture: "Image", lines: list[dict]) -> "Image":
    """A copy of the picture with a red frame around each line's box."""
    from PIL import ImageDraw

    picture = picture.copy()
    for line in lines:
        ImageDraw.Draw(picture).rectangle(line["box"], outline="red")
    return picture


if __name__ == "__main__":
    run(main, Config)
