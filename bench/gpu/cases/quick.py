"""The whole line at toy length on this device: data, VAE, pretraining, SFT, DPO, Flow-GRPO, export, diffusers."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def case(tiny: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "demo/line.py",
            "--recipe",
            "quick",
            "--out",
            folder,
            *(["--dry-run"] if tiny else []),
        ]
        begin = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"status {done.returncode}: {(done.stderr or done.stdout)[-600:]}")
        stages = sum(line.startswith("[") for line in done.stdout.splitlines())
        return {"stages": stages, "line_seconds": time.monotonic() - begin}
