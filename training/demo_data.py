"""Pictures for an entry that is given none: 480 of words, shapes and photographs, drawn if missing.

The shipped networks encode them.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from command_line import UserError, die_with_parent
from training.source import BASE

ROOT = Path(__file__).parent.parent
FOLDER = Path("runs/demo-data")
SHARD = "shard-000000.tar"
"""The demo's pictures fill one shard; that it is there means that all of them are."""


def demo_pictures() -> Path:
    """Raw shards of the demo's pictures; rank 0 makes them if they are missing, the others wait for it."""
    raw = FOLDER / "raw"
    if not (raw / SHARD).exists():
        if os.environ.get("RANK", "0") == "0":
            run_script("data_pipeline/synthesize.py", "--count", 480, "--size", 128, "--out", raw)
        while not (raw / SHARD).exists():
            time.sleep(1)
    return raw


def encoded_folder(side_px: int) -> Path:
    """Where the demo's pictures lie, encoded at a side."""
    return FOLDER / f"encoded-{side_px}"


def demo_data(side_px: int) -> Path:
    """Encoded data set of the demo; rank 0 makes what is missing, the others wait for it."""
    encoded = encoded_folder(side_px)
    if not _is_whole(encoded):
        if os.environ.get("RANK", "0") == "0":
            where = ("--data", demo_pictures(), "--components", BASE, "--res", side_px, "--out", encoded)
            run_script("data_pipeline/produce.py", *where)
        while not _is_whole(encoded):
            time.sleep(1)
    return encoded


def _is_whole(encoded: Path) -> bool:
    return all((encoded / name).exists() for name in ("dataset.json", SHARD))


def run_script(script: str, *arguments: object) -> None:
    """Run an entry of this repository to its end. UserError if it fails.

    If this process is killed, so is it, and the next run does not meet it at work.
    """
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    status = subprocess.run(command, env=alone, preexec_fn=die_with_parent).returncode
    if status:
        raise UserError(f"{script} ended with status {status}; it has said why")
