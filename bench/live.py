"""A trainer on data that are still being made against the same trainer on the finished data: milliseconds a step.

The trainer is kept on one core, the producers on another, and these have a head start, so that data are never missing.
Blocks of steps on the growing and on the finished set alternate in one process; printed is the median of their ratio.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

try:
    from command_line import run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Config:
    steps: int = 500
    block: int = 25
    batch_size: int = 32
    pictures: int = 20000


def main(config: Config) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed, one for the trainer and one for producers")
    trainer_core, producer_core = sorted(os.sched_getaffinity(0))[:2]
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        raw, out, whole = (Path(folder) / name for name in ("raw", "live", "whole"))
        make = [sys.executable, "data_pipeline/synthesize.py", "--kinds", "square-shapes", "--size", "64"]
        subprocess.run([*make, "--count", str(config.pictures), "--out", str(raw)], check=True, cwd=ROOT)
        produce = [sys.executable, "data_pipeline/produce.py", "--data", str(raw), "--components", "base"]
        subprocess.run([*produce, "--out", str(whole)], check=True, cwd=ROOT)
        producer = subprocess.Popen(
            [*produce, "--out", str(out)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, {producer_core}),
        )  # fmt: skip
        try:
            os.sched_setaffinity(0, {trainer_core})
            compare(config, out, whole)
        finally:
            producer.kill()
            producer.wait()
            shutil.rmtree(out, ignore_errors=True)


def compare(config: Config, live: Path, whole: Path) -> None:
    import torch

    from data_pipeline.live import is_live, open_dataset
    from data_pipeline.loader import Loader
    from model.config import PRESETS
    from training.engine.config import EngineConfig
    from training.engine.step import Engine
    from training.flow_matching import VelocityMSE
    from training.randomness import Randomness

    torch.set_num_threads(1)
    while not is_live(live) or len(list(live.glob("*.record.json"))) < 12:
        time.sleep(0.5)
    engine = Engine(PRESETS["tiny"], EngineConfig(dtype="bfloat16"), 10**6)
    engine.initialize(0)
    sets = {"live": open_dataset((live,)), "whole": open_dataset((whole,))}
    loaders = {name: Loader(dataset, config.batch_size) for name, dataset in sets.items()}
    algorithm, rng = VelocityMSE(), Randomness(0)
    times: dict[str, list[float]] = {"live": [], "whole": []}

    def block(loader: Loader) -> float:
        begin = time.perf_counter()
        for _ in range(config.block):
            engine.step(algorithm, next(loader), rng)
        return (time.perf_counter() - begin) / config.block

    for loader in loaders.values():
        block(loader)  # warms up
    while len(times["live"]) * config.block < config.steps:
        for name, loader in loaders.items():
            times[name].append(block(loader))
    ratios = [a / b for a, b in zip(times["live"], times["whole"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"{config.steps} steps of {config.batch_size}: live {1000 * statistics.median(times['live']):.1f} ms, whole "
        f"{1000 * statistics.median(times['whole']):.1f} ms a step, ratio {middle:.3f} [{low:.3f}, {high:.3f}]; waited "
        f"{sets['live'].waited_s:.1f} s; still growing at the end: {is_live(live)}"
    )
    for loader in loaders.values():
        loader.close()
    engine.close()


if __name__ == "__main__":
    run(main, Config)
