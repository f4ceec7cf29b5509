"""bench/gpu/run.py: every case at toy size, and what becomes of one that fails or does not end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import run as bench

ROOT = Path(__file__).parent.parent


def run(out: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "bench/gpu/run.py", "--tiny", "--out", str(out), "--budget-s", "5000", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_smoke_and_what_is_measured_already(tmp_path):
    out = tmp_path / "gpu.jsonl"
    done = run(out, "--cases", "smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = bench.read_lines(out)
    assert line["ok"] and line["tiny"] and 0 < line["loss, eager"] < 10
    again = run(out, "--cases", "smoke")
    assert again.returncode == 0 and not again.stdout
    assert len(out.read_text().splitlines()) == 1


@pytest.mark.slow
def test_all_cases(tmp_path):
    done = run(tmp_path / "gpu.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = bench.read_lines(tmp_path / "gpu.jsonl")
    assert [line["case"] for line in lines] == list(bench.LIMITS_S) and all(line["ok"] for line in lines)


def test_a_case_that_does_not_end_or_crashes_costs_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.LIMITS_S, "packs", 0.05)
    line = bench.in_a_process("packs", tiny=True)
    assert not line["ok"] and "no end within 0.05 s" in line["error"]
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "gone.py"))
    line = bench.in_a_process("parity", tiny=True)
    assert not line["ok"] and "status 2" in line["error"] and "gone.py" in line["error"]
    out = tmp_path / "gpu.jsonl"
    with pytest.raises(bench.UserError, match="failed: parity"):
        bench.main(bench.Config(cases=("parity", "mfu"), out=out, budget_s=bench.LIMITS_S["parity"] + 1, tiny=True))
    assert "left for another call: python bench/gpu/run.py --cases mfu" in capsys.readouterr().out
    assert [json.loads(row)["case"] for row in out.read_text().splitlines()] == ["parity"]


def test_a_warning_after_the_line_costs_nothing(monkeypatch):
    said = 'Loading\n{"case": "smoke", "ok": true}\n[W] {"a destructor"}\n3\n'
    monkeypatch.setattr(bench.subprocess, "Popen", lambda *a, **k: Said(said))
    assert bench.in_a_process("smoke", tiny=True)["ok"] is True


class Said:
    """A process that has ended."""

    returncode = 0

    def __init__(self, said: str):
        self.said = said

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        return self.said, None


def test_the_kit_asks_for_the_pinned_wheels():
    done = subprocess.run(
        [sys.executable, "bench/gpu/kit.py", "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    core, quant = done.stdout.splitlines()
    assert "megatron-core" in core and "constraints.txt" in core and "bitsandbytes" in quant
