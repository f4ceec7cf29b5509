"""Picture encode + decode of our VAE against diffusers' class, and the memory of long videos.

    OMP_NUM_THREADS=2 python bench/autoencoder.py --size 256 640

Ours and theirs run in a process each, in turn, one round trip after the other, so that both see the same machine; the
first of each is not counted. Memory is the growth of each process's peak over weights and input (Linux).
"""

import json
import statistics
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
    frames: tuple[int, ...] = (9, 33, 65)
    """Lengths of the videos whose memory is measured; none to leave that out."""
    video_size: int = 96
    """Side of their frames in pixels."""


WORKER = """
import json, sys, time, torch
from vae.autoencoder import PRESETS, VAE
kind, preset, size = sys.argv[1], sys.argv[2], int(sys.argv[3])

def memory(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024

def pieces(frames):
    return (torch.zeros(1, 3, 4 if i else 1, size, size) for i in range(1 + (frames - 1) // 4))

torch.manual_seed(0)
config = PRESETS[preset]
if kind == "ours":
    vae = VAE(config).eval()
else:
    from diffusers import AutoencoderKLQwenImage
    theirs = AutoencoderKLQwenImage(base_dim=config.base_dim, num_res_blocks=config.num_res_blocks).eval()
x = torch.rand(1, 3, 1, size, size) * 2 - 1
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts over
with torch.inference_mode():
    for line in sys.stdin:
        frames, start, cpu = int(line), time.perf_counter(), time.process_time()
        if kind == "theirs":
            clip = x if frames == 1 else torch.zeros(1, 3, frames, size, size)
            theirs.decode(theirs.encode(clip).latent_dist.mode())
        elif frames == 1:
            vae.reconstruct(vae.moments(x)[0])
        else:
            for part in vae.decode_stream(vae.encode_stream(pieces(frames))):
                pass
        spent = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        print(json.dumps(spent | {"mib": memory("VmHWM") - before}), flush=True)
"""


class Worker:
    """A process that holds our VAE or theirs and, asked for a number of frames, runs a round trip of so many."""

    def __init__(self, kind: str, preset: str, size: int):
        argv = [sys.executable, "-c", WORKER, kind, preset, str(size)]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, frames: int) -> dict[str, float]:
        self.process.stdin.write(f"{frames}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main(config: Config) -> None:
    print("picture        seconds: ours   theirs    ratio (least - most)   CPU ratio   peak MiB: ours  theirs")
    for size in config.size:
        ours, theirs = workers = [Worker(kind, config.preset, size) for kind in ("ours", "theirs")]
        for worker in workers:
            worker(1)
        pairs = [(ours(1), theirs(1)) for _ in range(config.repeats)]
        seconds = [statistics.median(p[i]["seconds"] for p in pairs) for i in (0, 1)]
        ratios = [b["seconds"] / a["seconds"] for a, b in pairs]
        cpu = statistics.median(b["cpu"] / a["cpu"] for a, b in pairs)
        print(
            f"{size:>4} px {seconds[0]:>20.2f} {seconds[1]:>8.2f} {statistics.median(ratios):>8.2f} "
            f"({min(ratios):.2f} - {max(ratios):.2f}) {cpu:>13.2f} {pairs[-1][0]['mib']:>16.0f} "
            f"{pairs[-1][1]['mib']:>7.0f}",
            flush=True,
        )
        for worker in workers:
            worker.close()
    if config.frames:
        print(f"\nvideo of {config.video_size} px    peak MiB: ours, streamed   theirs   seconds: ours   theirs")
    for frames in config.frames:
        rows = []
        for kind in ("ours", "theirs"):
            worker = Worker(kind, config.preset, config.video_size)
            rows.append(worker(frames))
            worker.close()
        print(
            f"{frames:>4} frames {rows[0]['mib']:>32.0f} {rows[1]['mib']:>8.0f} {rows[0]['seconds']:>15.1f} "
            f"{rows[1]['seconds']:>8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    run(main, Config)
