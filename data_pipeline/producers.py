"""Producers that a trainer starts: in its own process, in processes beside it, or on a Ray cluster.

All of them run `data_pipeline/produce.py` on one folder, so any number of others, started by hand on any machine that
sees the folder, may help. What they make does not depend on where they ran.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from command_line import UserError, die_with_parent
from data_pipeline.dataset import LIVE
from data_pipeline.production import Production, produce

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "data_pipeline" / "produce.py"


def arguments(work: Production) -> list[str]:
    """Those of produce.py, with paths that hold in any folder."""
    found = []
    for field in fields(work):
        value = getattr(work, field.name)
        if value == field.default:
            continue
        if isinstance(value, Path) or (field.name == "data" and "://" not in value):
            value = Path(value).resolve()
        found += [f"--{field.name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return found


class Producers:
    """Started producers; `problem` says what ended them, if something did.

    `where`: "thread" (in this process), a number of processes beside it, or "ray:N", N tasks of a Ray cluster (that of
    RAY_ADDRESS, or a local one), each with a GPU if there are any; Ray starts a task again whose machine dies.
    """

    def __init__(self, where: str, work: Production):
        self.problem: str | None = None
        self._stops: list[Callable[[], None]] = []
        kind, _, number = where.rpartition(":")
        if where == "thread":
            watched = [self._in_thread(work)]
        elif kind in ("", "ray") and number.isdigit() and int(number):
            start = self._beside if not kind else self._on_ray
            watched = start(int(number), work)
        else:
            raise UserError(f"--producers {where}: expected thread, a number of processes, or ray:NUMBER")
        self._watcher = threading.Thread(target=self._watch, args=(watched,), name="producers", daemon=True)
        self._watcher.start()

    def close(self, patience_s: float = 0.0) -> None:
        """End those that are still at work after a while; what they had begun is made by the next."""
        self._watcher.join(patience_s)
        for stop in self._stops:
            stop()

    def _watch(self, watched: list[Callable[[], str | None]]) -> None:
        """Wait for all of them; each says how it failed, or None. One that succeeds has seen the set whole."""
        results: list[str | None] = []
        waiting = [threading.Thread(target=lambda f=f: results.append(f()), daemon=True) for f in watched]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join()
        if results and all(results):
            self.problem = str(results[0])

    def _in_thread(self, work: Production) -> Callable[[], str | None]:
        def run() -> str | None:
            try:
                produce(work)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - told to whoever waits for a shard
                return f"{type(error).__name__}: {error}"
            return None

        return run

    def _beside(self, number: int, work: Production) -> list[Callable[[], str | None]]:
        started = [_begin([str(SCRIPT), *arguments(work)], work.out, str(i)) for i in range(number)]
        self._stops += [process.kill for process, _ in started]
        return [lambda p=process, log=log: _ended(p, log) for process, log in started]

    def _on_ray(self, number: int, work: Production) -> list[Callable[[], str | None]]:
        try:
            import ray
        except ModuleNotFoundError:
            raise UserError("--producers ray:N needs Ray: pip install -e '.[ray]' -c constraints.txt") from None
        if not ray.is_initialized():
            ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, include_dashboard=False)
        there = int(ray.cluster_resources().get("GPU", 0))
        if 0 < there < number:
            raise UserError(f"--producers ray:{number}: the cluster has {there} GPUs; ask for as many tasks at most")
        gpus = 1 if there else 0
        task = ray.remote(num_gpus=gpus, num_cpus=1, max_retries=-1)(_run_script)
        found = [task.remote([str(SCRIPT), *arguments(work)], work.out.resolve(), f"ray-{i}") for i in range(number)]
        self._stops += [lambda f=f: ray.cancel(f, force=True) for f in found]

        def wait(future) -> str | None:
            try:
                return ray.get(future)
            except Exception as error:  # noqa: BLE001 - told to whoever waits for a shard
                return str(error)

        return [lambda f=f: wait(f) for f in found]


def _run_script(arguments: list[str], out: Path, name: str) -> str | None:
    """Run produce.py on a worker of Ray; why it failed, or None."""
    return _ended(*_begin(arguments, out, name))


def _begin(arguments: list[str], out: Path, name: str) -> tuple[subprocess.Popen, Path]:
    """Start produce.py, the `name`-th on this machine if that is a number; its output goes to a file."""
    log = out / "producers" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = _alone() | {"PYTHONPATH": str(ROOT)} | ({"LOCAL_RANK": name} if name.isdigit() else {})
    with log.open("wb") as file:
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, preexec_fn=die_with_parent)
    return process, log


def _ended(process: subprocess.Popen, log: Path) -> str | None:
    """Wait for a process; the last line that it had to say if it failed, else None."""
    if process.wait() == 0:
        return None
    lines = [line for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    return (lines or [f"a producer ended with status {process.returncode}"])[-1]


def _alone() -> dict[str, str]:
    """The environment without what torchrun says of this process."""
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}


def plan_stamp(out: Path) -> tuple[int, int] | None:
    """Tells when the plan in `out` was written; None without one."""
    try:
        stat = (out / LIVE).stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_ino


def wait_for_plan(out: Path, before: tuple[int, int] | None, problem: Callable[[], str | None]) -> None:
    """Return once a producer has announced what it makes in `out`, where the plan was `before`. UserError with
    `problem`, once there is one."""
    while (now := plan_stamp(out)) is None or now == before or not (out / "empty.safetensors").is_file():
        if why := problem():
            raise UserError(f"no producer is at work on {out}: {why}")
        time.sleep(0.2)
