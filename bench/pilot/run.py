"""What makes the tiny MMDiT learn: recipes trained for equally many samples by the project's own trainer, and judged.

    python bench/pilot/run.py --arms free neat neat-noisy --seeds 0 1 2

An arm is a kind of pictures and flags of pretrain/stage.py; a new question is a new arm. Each is trained by one process
with one thread, so that two cores carry two runs of this script, and judged on 200 validation prompts. What is finished
is not done again; the table, of all that is there, is printed at the end.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

try:
    from command_line import UserError, run
    from demo.recipes import fast_flags
    from training.engine.config import fast_dtype
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Arm:
    """What differs from one pilot to another."""

    kind: str
    """Of the pictures, as data_pipeline/synthesize.py names them."""
    flags: str = ""
    """Of pretrain/stage.py, beyond COMMON."""


COMMON = (
    "--res 256 --preset tiny --components base --batch-size 64 --max-tokens 16384 --lr 8e-3 --muon-lr .1 "
    "--warmup-steps 50 --schedule cosine --final-lr-ratio .01 --ema-decay .997 --validate-every 0 --sample-every 100000"
)
ARMS = {
    "free": Arm("square-shapes"),
    "free-narrow": Arm("square-shapes", "--density-std .7"),
    "free-noisy": Arm("square-shapes", "--density-mean 1"),
    "neat": Arm("neat-shapes"),
    "neat-narrow": Arm("neat-shapes", "--density-std .7"),
    "neat-noisy": Arm("neat-shapes", "--density-mean 1"),
    "neat-noisier": Arm("neat-shapes", "--density-mean 2 --density-std 1.5"),
}


@dataclass(frozen=True)
class Config:
    arms: tuple[str, ...] = ("neat", "neat-noisy")
    """Of ARMS."""
    seeds: tuple[int, ...] = (0,)
    """Of the weights and of the noise; pictures are the same."""
    steps: int = 1300
    """Of 64 samples."""
    pictures: int = 20000
    """Different ones."""
    per_prompt: int = 4
    """Pictures that are judged of each of the 200 prompts."""
    out: Path = Path("runs/pilot")


def main(config: Config) -> None:
    if unknown := sorted(set(config.arms) - set(ARMS)):
        raise UserError(f"there is no arm {unknown[0]}; arms are {', '.join(ARMS)}")
    for seed in config.seeds:
        for name in config.arms:
            pilot(config, name, seed)
    print(table(config.out))


def pilot(config: Config, name: str, seed: int) -> None:
    """Make an arm's pictures, train on them, and judge what was learnt."""
    arm, out = ARMS[name], config.out / f"{name}-{config.steps}-{seed}"
    data = config.out / "data" / f"{arm.kind}-{config.pictures}"
    raw, encoded = data / "raw", data / "encoded"
    draw = ["data_pipeline/synthesize.py", "--kinds", arm.kind, "--count", config.pictures, "--size", 64]
    command(*draw, "--workers", 1, "--out", raw)
    command("data_pipeline/produce.py", "--data", raw, "--components", "base", "--res", 64, "--out", encoded)
    training = ["pretrain/stage.py", *COMMON.split(), *fast_flags(), *arm.flags.split(), "--data", encoded]
    command(*training, "--steps", config.steps, "--seed", seed, "--out", out)
    judging = ["-m", "evaluation", "--checkpoint", out, "--split", "validation", "--dtype", fast_dtype()]
    judging += ["--images-per-prompt", config.per_prompt, "--steps", 20, "--cfg-scale", 2.5]
    command(*judging, "--output", out / "judged")


def command(*words: object) -> None:
    """Run python WORDS in one thread. SystemExit if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    status = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, check=False).returncode
    if status:
        raise SystemExit(status)


def table(out: Path) -> str:
    """Markdown: a row for each finished pilot, with its loss at the end and the judge's strict verdicts by tag."""
    rows, tags = [], []
    for file in sorted(out.glob("*/judged/*/scores.json")):
        (suite,) = json.loads(file.read_text())["suites"].values()
        strict, folder = suite["scores"]["strict"], file.parents[2]
        losses = [json.loads(row)["loss"] for row in (folder / "metrics.jsonl").read_text().splitlines()][-100:]
        tags = list(strict["by kind"])
        each = [f"{strict['by kind'][tag]['value']:.2f}" for tag in tags]
        value = f"{strict['value']:.3f} [{strict['low']:.3f}, {strict['high']:.3f}]"
        rows.append([folder.name, f"{sum(losses) / len(losses):.3f}", value, *each])
    head = ["arm-steps-seed", "loss", "strict", *tags]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    run(main, Config)
