"""The whole line on one machine: data -> VAE -> pretraining -> SFT -> DPO -> Flow-GRPO -> export -> report.

Each stage is one of this project's commands, run as a user would run it. A finished stage is not run again; an
interrupted one is taken up where its own checkpoints left it. Two runs of one recipe give the same bits, however often
they were interrupted.
"""

import fcntl
import hashlib
import json
import os
import runpy
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

try:
    from command_line import UserError, die_with_parent, run
    from demo.recipes import RECIPES, Stage, base_stages, stages
    from files import write_json
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Config:
    recipe: Literal["quick", "demo", "base"] = "quick"
    """quick: 3 minutes on 2 cores, everything at toy length; demo: half an hour, long enough to learn something; base:
    make what is shipped in base/, in an hour and a half, into OUT/base."""
    data: Path | None = None
    """A folder of your images with captions (.txt or .json beside each), or of webdataset tars; default: ours."""
    out: Path | None = None
    """Where everything goes; default runs/<recipe>, with the name of the data appended when they are yours, and the
    seed when it is not 0."""
    skip_bad: bool = False
    """Leave out of --data what cannot be used, instead of refusing the folder."""
    seed: int = 0
    """Of our pictures, and of every trainer's weights, noise and prompts."""
    dry_run: bool = False
    """Print the stages and their commands, run nothing."""


def warm_up() -> None:
    """Import the heavy libraries, once; stages are forked from this process and find them loaded."""
    import warnings

    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import diffusers.pipelines.qwenimage.pipeline_qwenimage  # noqa: F401
    import megatron.core.dist_checkpointing  # noqa: F401
    import megatron.core.optimizer  # noqa: F401
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401


def run_command(command: list[str]) -> int:
    """Run `[torchrun --nproc-per-node N] SCRIPT ARGS` in forked children of this warm process, which start at once;
    returns the exit status, of the first that failed if one did."""
    count, script = (int(command[2]), command[3:]) if command[0] == "torchrun" else (1, command)
    environments = ranks(count) if count > 1 else [{}]
    running, failed, interrupted = {fork(script, environment) for environment in environments}, 0, []
    # The terminal sends Ctrl-C to the children as well: let them save.
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    try:
        while running:
            pid, code = os.wait()
            running.discard(pid)
            status = os.waitstatus_to_exitcode(code)
            failed = failed or status
            if status not in (0, 130):
                for other in running:  # they would wait for it for ever
                    os.kill(other, signal.SIGKILL)
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted and not failed:  # it came when they were all but finished
        print("interrupted; run the same command again to go on", file=sys.stderr, flush=True)
        return 130
    return failed


def ranks(count: int) -> list[dict[str, str]]:
    """What torchrun tells each of the processes of one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    return [{n: str(v) for n, v in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()} for rank in range(count)]


def fork(command: list[str], environment: dict[str, str]) -> int:
    """Run `python SCRIPT ARGS` in a child; returns its number."""
    pid = os.fork()
    if pid == 0:
        die_with_parent()
        os.environ.update(environment)
        status = 1
        try:
            sys.argv = list(command)
            sys.path[0] = str((ROOT / command[0]).parent)
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
            status = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pid


def fingerprint(stage: Stage, before: str) -> str:
    """Changes when the stage's command, what it reads of the user's, or any stage before it does."""
    parts = [stage.name, stage.command, before, *([stage.reads] if stage.reads else [])]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def run_line(line: list[Stage], out: Path) -> None:
    """Run every stage that is not finished yet. Raises UserError that names the stage which failed, or was run
    otherwise."""
    markers = out / "finished"
    markers.mkdir(parents=True, exist_ok=True)
    before, begin = "", time.monotonic()
    for number, stage in enumerate(line, 1):
        mark, marker = fingerprint(stage, before), markers / f"{stage.name}.json"
        before = mark
        title = f"[{number}/{len(line)}] {stage.name}: {stage.purpose}"
        if marker.exists():
            if json.loads(marker.read_text())["fingerprint"] != mark:
                of = "other pictures or settings" if stage.reads else "another recipe or version"
                raise UserError(f"{out} holds {stage.name} of {of}: delete the folder, or give another --out")
            print(f"{title} (finished before)", flush=True)
            continue
        print(f"\n{title}\n    {stage}", flush=True)
        warm_up()
        start = time.monotonic()
        status = run_command(stage.command)
        if status == 130:
            raise SystemExit(130)  # that it was interrupted has been said
        if status:
            raise UserError(f"stage {stage.name} ended with status {status}; mend the cause and run the same command")
        write_json(marker, {"fingerprint": mark, "seconds": round(time.monotonic() - start, 1)})
        if stage.page:
            print(f"    open {stage.page}", flush=True)
    print(f"\nfinished in {time.monotonic() - begin:.0f} s; open {line[-1].page}", flush=True)


def lock(out: Path):
    """Hold the run folder; a second run of the same line waits until the first has ended."""
    handle = open(out / ".lock", "w")  # noqa: SIM115
    if sys.platform == "linux":  # where children end with this process, and one that does not must hold no lock
        os.register_at_fork(after_in_child=handle.close)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another run is at work in {out}; waiting for it to end", flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def main(config: Config) -> None:
    data = config.data.resolve() if config.data else None
    if data is not None and not data.exists():
        raise UserError(f"{config.data} does not exist; --data takes a folder of pictures with captions or of tars")
    if data is not None and config.recipe == "base":
        raise UserError("--recipe base draws its own pictures; --data goes with quick and demo")
    if config.seed and config.recipe == "base":
        raise UserError("--recipe base has seeds of its own; --seed goes with quick and demo")
    name = config.recipe if data is None else f"{config.recipe}-{data.name}"
    out = config.out or Path("runs") / (f"{name}-seed-{config.seed}" if config.seed else name)
    line = (
        base_stages(out)
        if config.recipe == "base"
        else stages(RECIPES[config.recipe], out, data, config.seed, config.skip_bad)
    )
    if config.dry_run:
        for number, stage in enumerate(line, 1):
            print(f"[{number}/{len(line)}] {stage.name}: {stage.purpose}\n    {stage}")
        return
    if os.environ.get("MAKELEVEL"):
        die_with_parent()
    out.mkdir(parents=True, exist_ok=True)
    handle = lock(out)
    try:
        run_line(line, out)
    finally:
        handle.close()


if __name__ == "__main__":
    run(main, Config)
