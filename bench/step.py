"""A whole training step, from data on disk to updated weights: the engine against a loop around diffusers' model.

    ours        the loader, packs, the engine
    accelerate  QwenImageTransformer2DModel as its users train it, in batches of one picture size, prompts padded to the
                longest (bench/loops/accelerated.py)

Both see the same samples in the same steps, made of full batches of one size each; they begin with the same weights,
draw the same noise, noise levels and dropped prompts, and clip the gradient at 1; both run AdamW on fp32 weights and
keep a moving average. Their losses must agree. Blocks of steps alternate in one process, or, under torchrun, in each.
Pictures have no references: diffusers' model takes them in a batch only if all are of one size.

Peak memory is that of a process that trains one of the two alone, above what it held before the model was built.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
try:
    from command_line import UserError, run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}
"""Largest relative difference of a step's loss."""


@dataclass(frozen=True)
class Config:
    preset: Literal["tiny", "small"] = "tiny"
    """Its text states are as wide as the data's."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    compile: bool = False
    """Compile the blocks of both."""
    batch: int = 16
    """Pictures of one size that the loop takes at once."""
    accumulate: int = 4
    """Such batches in a step, over all ranks."""
    max_tokens: int = 4096
    """Tokens of a pack of ours at most."""
    block: int = 4
    """Steps from one turn to the next."""
    rounds: int = 12
    """Turns of each that count; one more warms up."""
    size: int = 64
    """Pictures have about the area of a square with this side, in pixels."""
    samples: int = 512
    data: Path | None = None
    """Encoded data set. Default: shapes and texts in all aspect ratios, made for this run."""
    memory: bool = True
    """Measure peak memory too, each contestant in a process of its own."""
    alone: Literal["", "ours", "accelerate"] = ""
    """Run a block of one contestant and print its peak memory (how `memory` measures)."""


def main(config: Config) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with data_of(config) as data:
        compare(replace(config, data=data))


@contextmanager
def data_of(config: Config) -> Iterator[Path]:
    """The folder of --data, or of data that are made for as long as they are needed."""
    if config.data is not None:
        yield config.data
        return
    if "RANK" in os.environ:
        raise UserError("under torchrun give encoded pictures by --data")
    with tempfile.TemporaryDirectory() as folder:
        raw, out, size = Path(folder) / "raw", Path(folder) / "encoded", str(config.size)
        make = ["data_pipeline/synthesize.py", "--kinds", "shapes,text", "--size", size, "--count", str(config.samples)]
        produce = ["data_pipeline/produce.py", "--data", str(raw), "--components", "base", "--res", size]
        for command in ([*make, "--out", str(raw)], [*produce, "--out", str(out)]):
            subprocess.run([sys.executable, *command], check=True, cwd=ROOT, capture_output=True)
        yield out


def compare(config: Config) -> dict[str, Any]:
    """Measure, print and return the figures; ValueError if the losses differ."""
    import torch

    from bench.gpu.measure import peak_mib
    from bench.loops.accelerated import Accelerated
    from bench.loops.ours import Ours
    from data_pipeline.dataset import EncodedDataset
    from model.config import PRESETS
    from training.engine import device
    from training.engine.config import EngineConfig, OptimizerConfig, ParallelConfig

    layout, dataset = device.start(ParallelConfig()), EncodedDataset(config.data)
    if config.accumulate % layout.world_size:
        raise UserError(f"{config.accumulate} batches do not divide over {layout.world_size} processes")
    shape = replace(PRESETS[config.preset], joint_attention_dim=dataset.txt_empty.shape[1])
    settings = EngineConfig(optimizer=OptimizerConfig(warmup_steps=0), dtype=config.dtype, compile=config.compile)
    both = shape, settings, dataset, config.batch, config.accumulate
    makers = {"ours": lambda: Ours(*both, config.max_tokens), "accelerate": lambda: Accelerated(*both)}
    if config.alone:
        print(peak_mib(lambda: makers[config.alone]().train(config.block)))
        return {}

    contestants = {who: make() for who, make in makers.items()}
    seconds = alternate(contestants, config)
    device.stop()
    ours, theirs = contestants.values()
    apart = max(abs(a - b) / b for a, b in zip(ours.losses, theirs.losses, strict=True))
    low, middle, high = statistics.quantiles(
        [b / a for a, b in zip(seconds["ours"], seconds["accelerate"], strict=True)], n=4
    )
    ms = {who: 1e3 * statistics.median(s) / (config.batch * config.accumulate) for who, s in seconds.items()}
    if layout.rank == 0:
        print(
            f"{config.preset}, {config.dtype}{', compiled' * config.compile}, {layout.world_size} x "
            f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}: {config.rounds} turns of "
            f"{config.block} steps of {config.accumulate} x {config.batch} pictures\n"
            f"ours {ms['ours']:.2f} ms, accelerate {ms['accelerate']:.2f} ms a picture: "
            f"x{middle:.2f} [{low:.2f}, {high:.2f}]\n"
            f"tokens: ours {ours.tokens}, accelerate {theirs.tokens}: x{theirs.tokens / ours.tokens:.2f}\n"
            f"losses {ours.losses[0]:.4f} to {ours.losses[-1]:.4f}, at most {apart:.1e} of them apart",
            flush=True,
        )
    if not apart <= TOLERANCE[config.dtype]:
        raise ValueError(f"the losses are {apart:.1e} of them apart: this is another computation")
    found = {"ratio": middle, "quartiles": (low, high), "tokens": (ours.tokens, theirs.tokens), "apart": apart}
    if config.memory and layout.world_size == 1:
        found["peak_mib"] = [peak_alone(config, who) for who in contestants]
        print("peak: ours {:.0f} MiB, accelerate {:.0f} MiB".format(*found["peak_mib"]))
    return found


def alternate(contestants: dict[str, Any], config: Config) -> dict[str, list[float]]:
    """Seconds a step of each, turn by turn; closes them."""
    import torch

    seconds: dict[str, list[float]] = {who: [] for who in contestants}
    for turn in range(config.rounds + 1):
        for who, contestant in contestants.items():
            begin = time.perf_counter()
            contestant.train(config.block)
            torch.cuda.synchronize()
            if turn:  # the first warms up
                seconds[who].append((time.perf_counter() - begin) / config.block)
    for contestant in contestants.values():
        contestant.close()
    return seconds


def peak_alone(config: Config, who: str) -> float:
    """What --alone prints."""
    taken = ("preset", "dtype", "batch", "accumulate", "max_tokens", "block", "data")
    flags = [word for name in taken for word in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]
    command = [sys.executable, __file__, "--alone", who, *flags, *["--compile"] * config.compile]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


if __name__ == "__main__":
    run(main, Config)
