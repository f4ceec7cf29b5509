"""What the first hour on a GPU measures: cases, each in a process of its own with a limit of its own and one line of
JSON, so that one that crashes costs a line.

    python bench/gpu/run.py --out gpu.jsonl                    # as many as fit into nine minutes; says how to go on
    python bench/gpu/run.py --cases mfu packs --out gpu.jsonl
    python bench/gpu/run.py --tiny                             # the same cases at toy size, on whatever device there is

A case is a file of bench/gpu/cases with `case(tiny: bool) -> dict`. What ran well is not measured again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

try:
    from command_line import UserError, run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

LIMITS_S = {"smoke": 150, "parity": 150, "mfu": 300, "packs": 200, "lora": 300, "full": 300, "quick": 220}
"""Cases in order of worth, with the seconds that each may take: 27 minutes in all."""


@dataclass(frozen=True)
class Config:
    cases: tuple[str, ...] = tuple(LIMITS_S)
    """Cases to run, in this order."""
    out: Path = Path("gpu.jsonl")
    """File of the lines; those of cases that ran well there are kept."""
    budget_s: float = 540.0
    """Cases that might not end within so many seconds of the start are left for another call."""
    tiny: bool = False
    """Toy sizes, on whatever device there is."""
    case: str | None = None
    """Run this one in this process and print its line."""


def main(config: Config) -> None:
    if unknown := sorted({*config.cases, *([config.case] if config.case else [])} - set(LIMITS_S)):
        raise UserError(f"there is no case {', '.join(unknown)}; there are {', '.join(LIMITS_S)}")
    if config.case is not None:
        print(json.dumps(measured(config.case, config.tiny)), flush=True)
        return
    done = {line["case"] for line in read_lines(config.out) if line["ok"] and line["tiny"] == config.tiny}
    begin, left = time.monotonic(), []
    for name in (name for name in config.cases if name not in done):
        if time.monotonic() - begin + LIMITS_S[name] > config.budget_s:
            left.append(name)
            continue
        line = in_a_process(name, config.tiny)
        with config.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(shown(line), flush=True)
    if left:
        print(f"left for another call: python bench/gpu/run.py --cases {' '.join(left)} --out {config.out}")
    if failed := [line["case"] for line in read_lines(config.out) if line["case"] in config.cases and not line["ok"]]:
        raise UserError(f"failed: {', '.join(dict.fromkeys(failed))}; {config.out} says how")


def in_a_process(name: str, tiny: bool) -> dict:
    """The line of a case that runs in a process group of its own, which is killed at the case's limit."""
    command = [sys.executable, __file__, "--case", name, *(["--tiny"] if tiny else [])]
    begin = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, status = process.communicate(timeout=LIMITS_S[name])[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, status = process.communicate()[0], "time"
    lines = said.strip().splitlines() or [""]
    line = next(filter(None, map(_line, reversed(lines))), None)
    if line is None:
        why = f"no end within {LIMITS_S[name]} s" if status == "time" else f"status {status}"
        line = {"case": name, "tiny": tiny, "ok": False, "error": f"{why}: {lines[-1][-400:]}", "said": lines[-20:]}
    return line | {"seconds": round(time.monotonic() - begin, 1), "date": datetime.now(UTC).date().isoformat()}


def _line(said: str) -> dict | None:
    """What `measured` printed, if this is it: libraries may warn after it."""
    try:
        found = json.loads(said)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) and "case" in found else None


def measured(name: str, tiny: bool) -> dict:
    """The line of a case, run here."""
    import torch

    if not tiny and not torch.cuda.is_available():
        raise UserError("no GPU here; --tiny runs the cases on the CPU")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    values = import_module(f"bench.gpu.cases.{name}").case(tiny)
    return {"case": name, "tiny": tiny, "ok": True, "device": device, "torch": torch.__version__, **values}


def read_lines(file: Path) -> list[dict]:
    """The newest line of each case."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return list({(line["case"], line["tiny"]): line for line in lines}.values())


def shown(line: dict) -> str:
    """A line for people."""
    values = {k: v for k, v in line.items() if k not in ("case", "tiny", "ok", "said", "date", "torch", "device")}
    told = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    return f"{line['case']:7} {'ok    ' if line['ok'] else 'FAILED'} {told}"


if __name__ == "__main__":
    run(main, Config)
