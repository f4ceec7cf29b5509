"""`make quick`, killed at ten seeded moments and started again each time, ends in the bits of an undisturbed run."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.sample_index import INDEX

ROOT = Path(__file__).resolve().parents[2]
COMPARED = ["**/*.tar", "**/*.safetensors", "**/metrics.jsonl"]


def start(out: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "demo/line.py", "--recipe", "quick", "--out", str(out)]
    return subprocess.Popen(command, cwd=ROOT, stdout=log.open("a"), stderr=subprocess.STDOUT, start_new_session=True)


def contents(out: Path) -> dict[str, str]:
    """Hash of every file that holds data or weights; sharded checkpoints are compared through the export, and an index
    of shards, which notes their times, through these."""
    files = sorted({f for pattern in COMPARED for f in out.glob(pattern) if f.name != INDEX})
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_kills_change_nothing(tmp_path):
    # one path for both runs, since run folders record where their inputs are
    line, kept = tmp_path / "line", tmp_path / "undisturbed"
    begin = time.monotonic()
    assert start(line, tmp_path / "undisturbed.log").wait() == 0, (tmp_path / "undisturbed.log").read_text()[-2000:]
    seconds = time.monotonic() - begin
    expected = contents(line)
    assert any("export" in name for name in expected) and any("grpo" in name for name in expected)
    line.rename(kept)

    rng = random.Random(0)
    log = tmp_path / "killed.log"
    for number in range(10):
        process = start(line, log)
        try:
            process.wait(timeout=rng.uniform(0.05, 0.35) * seconds)
        except subprocess.TimeoutExpired:
            (os.kill, os.killpg)[number % 2](process.pid, signal.SIGKILL)  # its children end with it
            process.wait()
    assert start(line, log).wait() == 0, log.read_text()[-2000:]
    assert contents(line) == expected
