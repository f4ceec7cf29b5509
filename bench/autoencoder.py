"""Picture encode + decode of our VAE against diffusers' class: CPU seconds and peak memory.

    OMP_NUM_THREADS=2 python bench/autoencoder.py --size 256 640

Each measurement runs in a process of its own, ours and theirs in turn, and counts the best of --repeats. CPU seconds
are summed over threads, so that other work on the machine matters less.
"""

import json
import subprocess
import sys
from dataclasses import dataclass

try:
    from command_line import run
except ModuleNotFoundError:
    raise SystemExit("not installed: run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config:
    """What to measure."""

    size: tuple[int, ...] = (256,)
    """Sides of square pictures in pixels."""
    preset: str = "qwen-image"
    repeats: int = 3


MEASUREMENT = """
import json, resource, sys, time, torch
from vae.autoencoder import PRESETS, VAE
kind, preset, size, repeats = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.manual_seed(0)
config = PRESETS[preset]
if kind == "ours":
    vae = VAE(config).eval()
    round_trip = lambda x: vae.reconstruct(vae.moments(x)[0])
else:
    from diffusers import AutoencoderKLQwenImage
    vae = AutoencoderKLQwenImage(base_dim=config.base_dim, num_res_blocks=config.num_res_blocks).eval()
    round_trip = lambda x: vae.decode(vae.encode(x).latent_dist.mode()).sample
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
x = torch.rand(1, 3, 1, size, size) * 2 - 1
before, seconds = memory(), []
with torch.inference_mode():
    for _ in range(repeats):
        start = time.process_time()
        round_trip(x)
        seconds.append(time.process_time() - start)
print(json.dumps({"seconds": min(seconds), "mib": memory() - before}))
"""


def main(config: Config) -> None:
    print(f"{'size':>6} {'ours s':>9} {'diffusers s':>12} {'ratio':>6} {'ours MiB':>9} {'diffusers MiB':>14}")
    for size in config.size:
        ours, theirs = (measure(kind, config, size) for kind in ("ours", "diffusers"))
        print(
            f"{size:>6} {ours['seconds']:>9.2f} {theirs['seconds']:>12.2f} {theirs['seconds'] / ours['seconds']:>6.2f} "
            f"{ours['mib']:>9.0f} {theirs['mib']:>14.0f}",
            flush=True,
        )


def measure(kind: str, config: Config, size: int) -> dict[str, float]:
    """Best CPU seconds of a round trip, and the growth of peak memory over weights and input, in MiB."""
    argv = [sys.executable, "-c", MEASUREMENT, kind, config.preset, str(size), str(config.repeats)]
    return json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    run(main, Config)
