"""`make setup` where there is a GPU, with Python and pip in name only."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP = """#!/bin/sh
echo "$@" >>calls
case "$*" in *"[gpu]"*) echo "a wall of text"; exit {status};; esac
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("builds", [True, False])
def test_transformer_engine_is_built_with_its_tools_and_can_fail(tmp_path: Path, builds: bool):
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    executable(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\necho GPU 0\n")
    executable(tmp_path / ".venv" / "bin" / "python", PIP.format(status=0 if builds else 1))
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    ran = subprocess.run(["make", "setup"], cwd=tmp_path, env=alone | {"PATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    *_, tools, engine = (tmp_path / "calls").read_text().splitlines()
    assert {"wheel", "ninja", "pybind11"} <= set(tools.split()) and "--no-build-isolation" in engine
    said = ran.stdout.splitlines()[2:]
    assert (tmp_path / ".venv" / "ready").exists() and "wall of text" not in ran.stdout + ran.stderr
    assert len(said) == 0 if builds else len(said) == 1 and "going on without it" in said[0]
