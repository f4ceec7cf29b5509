"""What an entry takes when it is given nothing: the demo's pictures and tiny networks, made if missing."""

import os
import subprocess
import sys
import time
from pathlib import Path

from command_line import die_with_parent

TOY_SIDE_PX = {256: 64, 640: 96, 1328: 128}
"""Side of the squares that each stage trains the tiny preset on."""
STEPS = 200
"""Steps of a stage of the tiny preset."""

ROOT = Path(__file__).parent.parent
FOLDER = Path("runs/demo-data")
COMPONENTS = FOLDER / "components"
MODEL = FOLDER / "pretrain-256"
SHARD = "shard-000000.tar"
"""The demo's pictures fill one shard; that it is there means that all of them are."""


def demo_pictures() -> Path:
    """Raw shards of the demo's pictures; rank 0 makes them if they are missing, the others wait for it."""
    raw = FOLDER / "raw"
    if not (raw / SHARD).exists():
        if os.environ.get("RANK", "0") == "0":
            _run("data_pipeline/synthesize.py", "--count", 480, "--size", 128, "--out", raw)
        while not (raw / SHARD).exists():
            time.sleep(1)
    return raw


def demo_data(side_px: int) -> tuple[Path, Path]:
    """(encoded data set, components) of the demo; rank 0 makes what is missing, the others wait for it."""
    encoded, vae = FOLDER / f"encoded-{side_px}", FOLDER / "vae"
    if not _is_whole(encoded):
        if os.environ.get("RANK", "0") == "0":
            raw = demo_pictures()
            if not COMPONENTS.exists():
                _run("vae/train.py", "--recipe", "base", "--data", raw, "--size", 64, "--steps", 100, "--out", vae)
                _run("demo/components.py", "--vae", vae, "--out", COMPONENTS)
            where = ("--data", raw, "--components", COMPONENTS, "--res", side_px, "--out", encoded)
            _run("data_pipeline/produce.py", *where)
        while not _is_whole(encoded):
            time.sleep(1)
    return encoded, COMPONENTS


def demo_model(make: bool = True) -> Path:
    """Run of a tiny model that was pretrained for a few steps on the demo's pictures; by default made if missing."""
    trained = MODEL / "checkpoints" / f"step_{STEPS:08d}"
    if make and not trained.exists():
        if os.environ.get("RANK", "0") == "0":
            _run("pretrain/stage.py", "--res", 256, "--preset", "tiny", "--out", MODEL)
        while not trained.exists():
            time.sleep(1)
    return MODEL


def _is_whole(encoded: Path) -> bool:
    return all((encoded / name).exists() for name in ("dataset.json", SHARD))


def _run(script: str, *arguments: object) -> None:
    """Run an entry to its end; if this process is killed, so is it, and the next run does not meet it at work."""
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    subprocess.run(command, check=True, env=alone, preexec_fn=die_with_parent)
