"""What the pilot trains on: shapes pictures that hardly repeat, as latents, each with a short and a full caption.

    python bench/pilot/world.py --vae FOLDER --out FOLDER --count 30000

writes `latents.npy` (float16 [N, 16, h, w]) and `captions.json` ([[short, full], ...], the same sentence twice where
nothing more may be said), and the same of `held-out` pictures, drawn from validation prompts.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

try:
    from command_line import run
    from data_pipeline.synthesis import shapes_world as world
    from data_pipeline.synthesis.full_captions import full_caption
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config:
    vae: Path = Path("runs/pilot/vae")
    """Components folder, or folder with vae/, whose encoder makes the latents."""
    out: Path = Path("runs/pilot/data")
    side: int = 64
    """Pixels of a picture's side."""
    count: int = 40000
    held_out: int = 400
    seed: int = 1


def draw(rng: np.random.Generator, split: world.Split, side: int) -> tuple[np.ndarray, str, str]:
    """A picture of a prompt of `split`, its prompt and its full caption."""
    metadata = world.sample_prompt(rng, split)
    placed, name, background = world.arrange(metadata, rng, (side, side))
    picture = world.draw(placed, background, (side, side))
    return picture, metadata["prompt"], full_caption(metadata, placed, name, rng)


def write(out: Path, vae: Any, rng: np.random.Generator, split: world.Split, count: int, side: int) -> None:
    """Draw and encode `count` pictures of `split` into the folder `out`."""
    import torch

    out.mkdir(parents=True, exist_ok=True)
    latents = np.lib.format.open_memmap(
        out / ".tmp-latents.npy", "w+", np.float16, (count, vae.config.z_dim, side // 8, side // 8)
    )
    captions, start = [], time.monotonic()
    for at in range(0, count, 50):
        drawn = [draw(rng, split, side) for _ in range(min(50, count - at))]
        pixels = torch.from_numpy(np.stack([p for p, _, _ in drawn])).permute(0, 3, 1, 2)[:, :, None]
        z = vae.encode_latent(pixels.float() / 127.5 - 1)[:, :, 0]
        latents[at : at + len(drawn)] = z.numpy()
        captions += [[short, full] for _, short, full in drawn]
        if at % 5000 == 0:
            print(f"{out}: {at} of {count}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    latents.flush()
    (out / "captions.json").write_text(json.dumps(captions))
    (out / ".tmp-latents.npy").rename(out / "latents.npy")


def main(config: Config) -> None:
    import torch

    from vae.autoencoder import VAE

    torch.set_num_threads(1)
    vae = VAE.from_folder(config.vae)
    rng = np.random.default_rng([config.seed, 1])
    write(config.out / "held-out", vae, rng, "validation", config.held_out, config.side)
    rng = np.random.default_rng([config.seed, 0])
    write(config.out / "train", vae, rng, "train", config.count, config.side)


if __name__ == "__main__":
    run(main, Config)
