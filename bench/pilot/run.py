"""What makes a small MMDiT learn: arms trained on the same pictures by the project's own trainer, and judged in pairs.

    python bench/pilot/run.py --question pictures
    python bench/pilot/run.py --question positions --seeds 0 1 2 --steps 650

A question is a list of arms, each compared with the first on the same prompts and seeds; an arm is what it differs in.
Everything runs in one process with one thread, so that two cores carry two questions. What is finished is not done
again. The table, in Markdown, is printed at the end, and by --table alone.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Literal

try:
    from command_line import run, write_toml
    from demo.recipes import fast_flags
    from model.config import PRESETS
    from pretrain.mixing import tokens_and_flops
    from training.engine.config import fast_dtype
    from training.source import TOY_SIDE_PX
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Arm:
    """What differs from one pilot to another."""

    name: str
    kind: str = "neat-shapes"
    """Of the pictures, as data_pipeline/synthesize.py names them."""
    density: tuple[float, float] = (1.0, 1.0)
    """Mean and spread of the logit-normal density of noise levels."""
    lr: float = 8e-3
    """Of AdamW, at the width of the tiny model."""
    muon_lr: float | None = 0.1
    preset: str = "tiny"
    rope: str = "msrope"
    res: int = 256
    """Stage, and so the size of the pictures."""
    first: "Arm | None" = None
    """The arm whose run this one goes on from."""
    steps: float = 1.0
    """In those of the command line."""

    def flags(self) -> list[object]:
        """Of pretrain/stage.py."""
        mean, spread = self.density
        muon = [] if self.muon_lr is None else ["--muon-lr", self.muon_lr]
        return [
            "--res", self.res, "--preset", self.preset, "--width-base", PRESETS["tiny"].width, "--lr", self.lr, *muon,
            "--density-mean", mean, "--density-std", spread,
        ]  # fmt: skip

    @property
    def flops(self) -> float:
        """FLOPs, in those of a step's sample, of all the steps that it took to get here."""
        own = self.steps * tokens_and_flops(TOY_SIDE_PX[self.res], PRESETS[self.preset])[1]
        return own + (self.first.flops if self.first else 0.0)


BEST = Arm("best")
LOW = replace(BEST, name="64 px", steps=0.6)
LOW_HIGH = replace(BEST, name="64 then 96 px", res=640, steps=0.4, first=LOW, lr=4e-3, muon_lr=0.05)
HIGH = replace(BEST, name="96 px alone", res=640)
OPTIMIZERS = (
    BEST,
    *(Arm(f"muon {rate:g}", muon_lr=rate) for rate in (0.05, 0.2)),
    *(Arm(f"adamw {rate:g}", muon_lr=None, lr=rate) for rate in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)),
)
QUESTIONS: dict[str, tuple[Arm, ...]] = {
    "pictures": (
        Arm("free", kind="square-shapes", density=(0, 1)),
        Arm("free, narrow", kind="square-shapes", density=(0, 0.7)),
        Arm("free, noisy", kind="square-shapes"),
        Arm("neat", density=(0, 1)),
        Arm("neat, noisy"),
    ),
    "optimizer": OPTIMIZERS,
    "mini-optimizer": tuple(replace(arm, name=f"mini {arm.name}", preset="mini") for arm in OPTIMIZERS),
    "positions": (BEST, Arm("text first", rope="text-first"), Arm("scaling", rope="scaling")),
    "curriculum": (LOW_HIGH, replace(HIGH, steps=LOW_HIGH.flops / HIGH.flops)),
}
"""The first arm is what the others are compared with."""


@dataclass(frozen=True)
class Config:
    question: Literal[tuple(QUESTIONS)] = "pictures"
    arms: tuple[str, ...] = ()
    """Some of the question's. Default: all."""
    seeds: tuple[int, ...] = (0,)
    """Of the weights and of the noise; pictures are the same."""
    steps: int = 1300
    batch_size: int = 64
    pictures: int = 20000
    """Different ones."""
    images_per_prompt: int = 4
    """Pictures that are judged of each of the 200 validation prompts."""
    out: Path = Path("runs/pilot")
    table: bool = False
    """Only print what is there."""


def main(config: Config) -> None:
    config = replace(config, out=config.out.resolve())
    arms = [arm for arm in QUESTIONS[config.question] if not config.arms or arm.name in config.arms]
    if not config.table:
        for seed in config.seeds:
            runs = [train(config, arm, seed) for arm in arms]
            compared = ["--compare", *runs] if len(runs) > 1 else ["--checkpoint", *runs]
            judging = ["-m", "evaluation", *compared, "--split", "validation", "--dtype", fast_dtype()]
            judging += ["--images-per-prompt", config.images_per_prompt, "--steps", 20, "--cfg-scale", 2.5]
            command(*judging, "--output", judged(config, seed))
    print(table(config, arms))


def judged(config: Config, seed: int) -> Path:
    """Where the verdicts on a question's arms go."""
    more = "" if config.images_per_prompt == Config.images_per_prompt else f"-{config.images_per_prompt}-pictures"
    return config.out / "judged" / f"{config.question}-{length(config)}{more}-{seed}"


def folder(config: Config, arm: Arm, seed: int) -> Path:
    """Where an arm is trained."""
    return config.out / f"{arm.name}-{length(config)}-{seed}".replace(" ", "-").replace(",", "")


def length(config: Config) -> str:
    """Steps, and what they are of where that is unusual."""
    usual = (config.batch_size, config.pictures) == (Config.batch_size, Config.pictures)
    return f"{config.steps}" if usual else f"{config.steps}x{config.batch_size}-of-{config.pictures}"


def train(config: Config, arm: Arm, seed: int) -> Path:
    """Train an arm, and what it goes on from, on its pictures; returns its run."""
    out, side = folder(config, arm, seed), TOY_SIDE_PX[arm.res]
    data = config.out / "data" / f"{arm.kind}-{config.pictures}"
    draw = ["--kinds", arm.kind, "--count", config.pictures, "--size", 96, "--workers", 1, "--out", data / "raw"]
    command("data_pipeline/synthesize.py", *draw)
    encoded = data / f"encoded-{side}"
    command("data_pipeline/produce.py", "--data", data / "raw", "--components", "base", "--res", side, "--out", encoded)
    config.out.mkdir(parents=True, exist_ok=True)
    recipe = config.out / f"{out.name}.toml"
    write_toml({"rope": arm.rope}, recipe)
    start = "random" if arm.first is None else train(config, arm.first, seed)
    command(
        "pretrain/stage.py", "--config", recipe, *arm.flags(), "--init", start, "--data", encoded, "--components",
        "base", "--steps", round(arm.steps * config.steps), "--batch-size", config.batch_size, "--max-tokens", 16384,
        "--warmup-steps", 50, "--schedule", "cosine", "--final-lr-ratio", 0.01, "--ema-decay", 0.997, "--seed", seed,
        "--validate-every", 0, "--sample-every", 10**6, *fast_flags(), "--out", out,
    )  # fmt: skip
    return out


def command(*words: object) -> None:
    """Run python WORDS in one thread. SystemExit if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    status = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, check=False).returncode
    if status:
        raise SystemExit(status)


def table(config: Config, arms: list[Arm]) -> str:
    """Markdown: for each arm its strict score by seed, their mean, and the paired differences from the first arm."""
    cells: dict[str, list[str]] = {arm.name: [] for arm in arms}
    values: dict[str, list[float]] = {arm.name: [] for arm in arms}
    gains: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for seed in config.seeds:
        files = sorted(judged(config, seed).glob("*/scores.json"), key=lambda file: file.stat().st_mtime)
        found = [json.loads(file.read_text()) for file in files]
        alone = {data["source"]: only(data["suites"])["scores"]["strict"] for data in found if "suites" in data}
        first = str(folder(config, arms[0], seed))
        same = [data["differences"] for data in found if data.get("baseline") == first]
        differences = [item for data in same for item in data.items()]
        change = {name: only(suites)["strict"] for name, suites in differences}
        for arm in arms:
            name = str(folder(config, arm, seed))
            cells[arm.name].append(interval(alone[name]) if name in alone else "")
            values[arm.name] += [alone[name]["value"]] if name in alone else []
            if name in change:
                cells[arm.name][-1] += f" ({interval(change[name], '+')})"
                gains[arm.name].append(change[name]["value"])
    seeds = [f"seed {seed}" for seed in config.seeds]
    rows = [["arm", *seeds, "mean", "mean difference"], ["---"] * (len(seeds) + 3)]
    for arm in arms:
        means = [f"{mean(v):{sign}.3f}" if v else "" for v, sign in ((values[arm.name], ""), (gains[arm.name], "+"))]
        rows.append([arm.name, *cells[arm.name], *means])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def only(suites: dict[str, dict]) -> dict:
    """The one suite's part."""
    (suite,) = suites.values()
    return suite


def interval(entry: dict[str, float], sign: str = "") -> str:
    """value [low, high]"""
    return f"{entry['value']:{sign}.3f} [{entry['low']:{sign}.3f}, {entry['high']:{sign}.3f}]"


if __name__ == "__main__":
    run(main, Config)
