"""The stage before: whether it is finished, and what of it the next one starts from. Imports no torch."""

from pathlib import Path

from command_line import UserError, read_toml
from training.engine import checkpoint
from training.run_folder import read_metrics
from training.source import AT_RANDOM

RESOLUTIONS = (256, 640, 1328)
"""Of the stages, in order (Qwen-Image report, section 3.3)."""


def default_place(res: int, beside: Path | None = None) -> Path:
    """Where the run of a stage lies: beside that of another stage, else in runs/."""
    folder = Path("runs") if beside is None or not beside.name.startswith("pretrain-") else beside.parent
    return folder / f"pretrain-{res}"


def steps_done(run: Path) -> int:
    """Steps of a run's newest checkpoint; 0 if there is no run, or none of its checkpoints can be read."""
    try:
        return checkpoint.read_state(checkpoint.resolve(run, thorough=False))["step"]
    except (ValueError, OSError):
        return 0


def steps_planned(run: Path) -> int:
    """Length of a run, as it was begun."""
    return read_toml(run / "config.toml")["loop"]["steps"]


def samples_seen(run: Path, steps: int) -> int:
    """Samples that a run trained on in its first steps."""
    return round(sum(row["samples"] or 0 for row in read_metrics(run)[:steps]))


def start_of(res: int, out: Path, given: Path | None, may_wait: bool = False) -> Path | None:
    """What a stage starts from: what its run began from, or what was given, or the finished run of the stage before.

    None for random weights, which the first stage begins from unless told otherwise. UserError if another would (with
    `may_wait` it is the run of the stage before then), and for a run that began from something else than what is given;
    a folder of the same name is one that was moved.
    """
    if steps_done(out):
        init = read_toml(out / "config.toml").get("init")
        if given is not None and given.name != Path(init or AT_RANDOM).name:
            raise UserError(f"{out} started from {init or 'random weights'}, not from {given}; choose another --out")
        return None if init is None else Path(init)
    if given is not None or res == RESOLUTIONS[0]:
        return given
    before = RESOLUTIONS[RESOLUTIONS.index(res) - 1]
    run = default_place(before, out)
    done = steps_done(run)
    if may_wait or (done and done >= steps_planned(run)):
        return run
    what = f"has done {done} of {steps_planned(run)} steps" if done else "has no checkpoint"
    raise UserError(
        f"stage {res} starts from stage {before}, but {run} {what}: run `pretrain/stage.py --res {before}` to its end, "
        "or name a start: --init PATH, or --init random"
    )


def described(init: Path | None) -> str:
    """What a run starts from, in words: a run with its step and the samples that it has seen."""
    if init in (None, AT_RANDOM):
        return "random weights"
    if init.name.startswith("pretrain-") and not init.exists():
        return f"{init}, which is still to be trained"
    if not (done := steps_done(init)) or not (init / "metrics.jsonl").is_file():
        return str(init)
    return f"{init} (step {done:,}, {samples_seen(init, done):,} samples seen)"
