"""The line's commands: processes that torchrun would start, forked; what another recipe has left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command_line import UserError
from demo.line import run_line
from demo.recipes import stage

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, os, sys, time
from pathlib import Path
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
Path(sys.argv[1], os.environ["RANK"]).write_text(json.dumps({n: os.environ[n] for n in names}))
if sys.argv[2] == os.environ["RANK"]:
    raise SystemExit(3)
time.sleep(0.0 if sys.argv[2] == "none" else 3600)
"""


def run_command(folder: Path, fails: str) -> int:
    (folder / "script.py").write_text(SCRIPT)
    words = ["torchrun", "--nproc-per-node", "2", str(folder / "script.py"), str(folder), fails]
    code = f"import sys; from demo.line import run_command; sys.exit(run_command({words!r}))"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode


def test_ranks_are_told_what_torchrun_tells(tmp_path: Path):
    assert run_command(tmp_path, "none") == 0
    told = [json.loads((tmp_path / rank).read_text()) for rank in "01"]
    assert [(t["RANK"], t["LOCAL_RANK"]) for t in told] == [("0", "0"), ("1", "1")]
    for t in told:
        assert t["WORLD_SIZE"] == t["LOCAL_WORLD_SIZE"] == "2" and t["MASTER_PORT"] == told[0]["MASTER_PORT"]


def test_a_rank_that_fails_ends_the_others(tmp_path: Path):
    assert run_command(tmp_path, "1") == 3


def test_an_interruption_of_a_stage_that_ends_well_is_not_forgotten(tmp_path: Path):
    """As of a trainer in its last step; the line would go on with the next stage."""
    script = "import pathlib, signal, sys, time\nsignal.signal(signal.SIGINT, lambda *_: sys.exit(0))\n"
    (tmp_path / "script.py").write_text(f"{script}pathlib.Path(sys.argv[1], 'begun').touch()\ntime.sleep(60)\n")
    words = [str(tmp_path / "script.py"), str(tmp_path)]
    code = f"import sys; from demo.line import run_command; sys.exit(run_command({words!r}))"
    line = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    while not (tmp_path / "begun").exists() and line.poll() is None:
        time.sleep(0.02)
    os.killpg(line.pid, signal.SIGINT)
    assert line.wait(60) == 130


def test_what_another_recipe_has_left_is_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran = []
    monkeypatch.setattr("demo.line.run_command", lambda command: ran.append(command) or 0)
    line = [stage("data", "pictures", "draw.py", "--count", 3), stage("train", "steps", "train.py", "--steps", 5)]
    run_line(line, tmp_path)
    run_line(line, tmp_path)
    assert len(ran) == 2
    longer = [line[0], stage("train", "steps", "train.py", "--steps", 7)]
    with pytest.raises(UserError, match="holds train of another recipe or version"):
        run_line(longer, tmp_path)
    assert len(ran) == 2
