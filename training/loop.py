"""The only training loop: batches in, steps, log, checkpoints. Pretraining, SFT, DPO and RL all run it.

An algorithm is an iterator of batches and a loss (`training.algorithm`). To resume a run, run the same command: the
loop loads the newest intact checkpoint, which holds the batches' cursor, and goes on as if it had never stopped.
"""

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from command_line import progress
from training.cost.cards import GIB, in_this_machine
from training.run_folder import MEASURES, RunFolder

if TYPE_CHECKING:
    from training.algorithm import Algorithm, Batches
    from training.engine.step import Engine


WORTH_SAYING = 0.02
"""Share of a step's time that may be spent waiting for data before the progress line says so."""
SWITCH_S = 2e-4
"""Longest that a loader's thread keeps this one, which feeds the device, from the interpreter: Python's 5 ms come at
every other operation."""
NOT_FINITE = 3
"""Steps in a row whose loss or gradient is not finite, after which a run stops."""
IMPATIENT_S = 3.0
"""A signal that comes so long after the first one asks to stop at once."""


@dataclass(frozen=True)
class LoopConfig:
    """Length of a run and when it saves."""

    steps: int = 1000
    save_every: int = 500
    """Steps between checkpoints; the last step and an interruption save too."""
    keep: int = 2
    """Newest checkpoints that stay."""
    keep_every: int = 0
    """Checkpoints of each multiple of so many steps stay for ever. 0 for none."""
    best: str = "held_out/loss"
    """What decides which checkpoint OUT/best points to, which stays: held_out/NAME or validation/NAME, of a loss the
    lowest, of all else the highest, measured at the step of a checkpoint. Empty for none."""
    seed: int = 0
    """Seed of noise, timesteps and dropout."""

    def __post_init__(self):
        measured, _, name = self.best.partition("/")
        if self.best and (measured not in MEASURES or not name):
            raise ValueError(f"--best {self.best}: what decides is held_out/NAME or validation/NAME")


class Hook(Protocol):
    """Something done every so many steps and after the last, on all ranks: samples, validation."""

    every: int
    """One that has `first`, and true, is done before the first step, too."""

    def __call__(self, engine: "Engine", step: int) -> None: ...


def train(
    engine: "Engine",
    algorithm: "Algorithm",
    batches: "Batches",
    config: LoopConfig,
    run: RunFolder,
    hooks: Sequence[Hook] = (),
) -> bool:
    """Train until `config.steps` steps are done or `batches` end; returns whether a signal came in the last
    step, or while that was saved.

    SIGINT or SIGTERM lets the step end (and those after it that batches cannot be resumed within), saves, and raises
    KeyboardInterrupt; one that comes later does not wait.
    ValueError when step after step is not finite (see `training.not_finite`).
    """
    from data_pipeline.loader import Interrupted
    from training.engine.device import peak_memory
    from training.not_finite import write_batch
    from training.randomness import Randomness

    sys.setswitchinterval(SWITCH_S)
    rng = Randomness(config.seed)
    cursor = engine.resume(run.checkpoints)
    if cursor is not None:
        batches.load_state_dict(cursor["batches"])
    run.open(engine.step_count)
    known = in_this_machine() if engine.device.type == "cuda" else None
    peak_flops = None if known is None else known[1].flops * engine.world_size
    saved, not_finite = engine.step_count if cursor is not None else None, 0
    if engine.runs_ahead and hasattr(batches, "prepare"):
        batches.prepare = lambda batch: engine.prepare(algorithm, batch, rng)

    for hook in hooks if engine.step_count == 0 else ():
        if getattr(hook, "first", False):
            hook(engine, 0)
            engine.frozen.release()
    bar = progress(config.steps, run.path.name, "step", engine.step_count)
    with interruptions() as interrupted, finished_saves(engine), bar:
        grows = getattr(batches, "grows", False)
        if grows or (engine.world_size == 1 and hasattr(batches, "interrupted")):
            batches.interrupted = interrupted  # else data come at once
        while engine.step_count < config.steps:
            begin, here, gave_up = time.perf_counter(), batches.state_dict(), False
            try:
                microbatches = next(batches, None)
            except Interrupted:
                gave_up = True
            if engine.any_rank(gave_up) if grows else gave_up:  # one may have its data while another waits
                if saved != engine.step_count:
                    save(engine, here, run, config)
                run.close()
                raise KeyboardInterrupt
            if microbatches is None:
                break
            waited = time.perf_counter() - begin
            skipped = engine.skipped
            metrics = engine.step(algorithm, microbatches, rng)
            not_finite = not_finite + 1 if engine.skipped > skipped else 0
            step, last = engine.step_count, engine.step_count == config.steps
            speed = speed_of(batches, metrics, waited, time.perf_counter() - begin, peak_flops)
            run.log(step, metrics, speed | {"memory_gib": peak_memory(engine.device) / GIB})
            shown = {"loss": f"{metrics['loss']:.4g}"} if "loss" in metrics else {}
            unit = "tokens" if metrics["tokens"] else "samples"
            shown[f"{unit}/s"] = f"{speed[f'{unit}_per_second']:,.0f}"
            if speed.get("data_wait", 0) > WORTH_SAYING:
                shown["data_wait"] = f"{speed['data_wait']:.0%}"
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if not_finite == NOT_FINITE:
                run.close()
                told = write_batch(engine, algorithm, microbatches, rng, run.path / "nan" / f"step_{step:08d}")
                raise ValueError(
                    f"loss or gradient was not finite in {NOT_FINITE} steps in a row, the last is {step}; {told}"
                )
            for hook in hooks:
                if last or step % hook.every == 0:
                    hook(engine, step)
                    engine.frozen.release()
            stopping = engine.any_rank(interrupted() or engine.save_failed) and getattr(batches, "resumable", True)
            if last or stopping or step % config.save_every == 0:
                save(engine, batches.state_dict(), run, config)
                saved = step
            if stopping and not last:
                run.close()
                raise KeyboardInterrupt
        if saved != engine.step_count:
            save(engine, batches.state_dict(), run, config)
    run.close()
    return engine.any_rank(interrupted())


def speed_of(
    batches: "Batches", metrics: dict[str, float], waited: float, seconds: float, peak_flops: float | None = None
) -> dict[str, float]:
    """Samples, tokens and FLOPs a second, and with the `peak_flops` a second of all devices the share of it ("mfu"),
    where FLOPs were counted.

    Of a `data_pipeline.loader.Loader` also the share of a step's time that went with waiting for data, how many steps
    are ready ("queue_depth"), how many broken samples were passed over, and this process's samples a second of each
    bucket ("samples_per_second/WxH").
    """
    speed = {f"{name}_per_second": metrics[name] / seconds for name in ("samples", "tokens", "flops")}
    speed["seconds"] = seconds
    if peak_flops is not None and metrics["flops"]:
        speed["mfu"] = speed["flops_per_second"] / peak_flops
    if not hasattr(batches, "depth"):
        return speed
    speed |= {"data_wait": waited / seconds, "queue_depth": batches.depth, "passed_over": batches.passed_over}
    return speed | {f"samples_per_second/{bucket}": count / seconds for bucket, count in batches.buckets.items()}


def save(engine: "Engine", cursor: dict[str, Any], run: RunFolder, config: LoopConfig) -> None:
    """Begin to write a checkpoint of this moment, with the batches' cursor; once it is there, others are deleted."""
    run.sync()
    tidy = partial(run.tidy, config.keep, config.keep_every, config.best)
    engine.begin_save_step(run.checkpoints, {"batches": cursor, **run.facts}, tidy)


@contextmanager
def finished_saves(engine: "Engine") -> Iterator[None]:
    """However it is left, the save that was begun is waited for; within `interruptions`, for torchrun sends a signal of
    its own after a Ctrl-C."""
    try:
        yield
    finally:
        engine.wait_for_save()


@contextmanager
def interruptions() -> Iterator[Any]:
    """A function that says whether SIGINT or SIGTERM came.

    A further one raises KeyboardInterrupt at once, unless it comes within seconds: Ctrl-C reaches a worker of torchrun
    twice, from the terminal and from torchrun.
    """
    received: list[float] = []

    def handler(number: int, frame: Any) -> None:
        received.append(time.monotonic())
        if received[-1] - received[0] > IMPATIENT_S:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
