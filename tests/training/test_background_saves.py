"""Checkpoints that a thread writes while training goes on: their moment, kills, failures, which stay, memory."""

import json
import os
import random
import signal
import statistics
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from small_loop import CONFIGURATION, At, assert_same_run, count_rows, run_loop, train
from test_checkpoints import filled, make_engine, same, step, stored
from worlds import run_world, start

from training.engine.checkpoint import damage, list_checkpoints
from training.run_folder import RunFolder
from training.source import look


def held_up(rank: int, folder: Path, layout: tuple[int, int, bool], dtype: str) -> None:
    """The same moment, saved at once, and by a thread that may begin only when two more steps are done."""
    from training.engine import saving

    engine = filled(make_engine(layout, dtype=dtype))
    step(engine, 0), step(engine, 1)
    engine.save(folder / "at-once", {})
    go_on, write = threading.Event(), saving.torch_checkpoint.save
    saving.torch_checkpoint.save = lambda *args, **kwargs: (go_on.wait(), write(*args, **kwargs))
    engine.begin_save_step(folder, {}, lambda: None)
    step(engine, 2), step(engine, 3)
    assert not engine.save_failed and not list_checkpoints(folder)
    go_on.set()
    engine.wait_for_save()
    saving.torch_checkpoint.save = write
    engine.save(folder / "later", {})


@pytest.mark.parametrize("size, layout, dtype", [(1, (1, 1, False), "bfloat16"), (2, (1, 1, False), "float32")])
def test_a_save_is_of_the_moment_at_which_it_began(tmp_path: Path, size: int, layout: tuple, dtype: str):
    run_world(size, held_up, tmp_path, layout, dtype)
    at_once, behind = stored(tmp_path / "at-once"), stored(tmp_path / "step_00000002")
    assert same(at_once, behind) and damage(tmp_path / "step_00000002") is None
    assert not same(behind, stored(tmp_path / "later"))


def failing(rank: int, folder: Path) -> tuple[str, bool]:
    """What a rank is told of a save whose files rank 1 cannot bring to the disk, and whether it then can save."""
    from training.engine import checkpoint

    engine = filled(make_engine())
    step(engine, 0)
    engine.save_step(folder, {}, 2)
    step(engine, 1)
    describe = checkpoint.describe_files

    def full(files: list[Path]) -> dict:
        raise OSError("no space left")

    if rank == 1:
        checkpoint.describe_files = full
    engine.begin_save_step(folder, {}, lambda: None)
    while not engine.save_failed:
        time.sleep(0.01)
    with pytest.raises(OSError) as raised:
        engine.wait_for_save()
    engine.wait_for_save()  # said once
    checkpoint.describe_files = describe
    before = [path.name for path in list_checkpoints(folder)]
    engine.save_step(folder, {}, 2)
    return str(raised.value), before == ["step_00000001"], engine.resume(folder) == {}


def test_a_failed_writer_is_known_to_all_ranks(tmp_path: Path):
    for message, left, again in run_world(2, failing, tmp_path):
        assert message == "a checkpoint could not be written: rank 1: no space left" and left and again


def signalled_in_its_last_save(rank: int, folder: Path) -> str:
    """A run that gets a signal in its sixth step, and another one while the save of that step is waited for."""
    from training.engine import saving

    end, write = lambda: os.kill(os.getpid(), signal.SIGTERM), saving.torch_checkpoint.save
    hook = At(end, (6,))

    def late(*args, **kwargs) -> None:
        if 6 in hook.seen:
            time.sleep(0.3)
            end()
        write(*args, **kwargs)

    saving.torch_checkpoint.save = late
    try:
        train(folder, CONFIGURATION, hooks=[hook])
    except KeyboardInterrupt:
        return "interrupted"
    return "finished"


def test_a_second_signal_leaves_the_last_save_be(tmp_path: Path):
    assert run_world(1, signalled_in_its_last_save, tmp_path) == ["interrupted"]
    newest = list_checkpoints(tmp_path / "checkpoints")[0]
    assert newest.name == "step_00000006" and damage(newest) is None


def saves(folder: Path) -> set[tuple[str, int]]:
    """Checkpoints that are not whole, each with the moment at which a file was last added."""
    found = set()
    for path in folder.glob("checkpoints/.tmp-step_*"):
        with suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def kill_again_and_again(folder: Path, moments: list[str], config, seed: int) -> None:
    """Kill runs at random moments, each "save" while a thread writes a checkpoint; then let one go on to its end."""
    rng, within = random.Random(seed), 0
    for i, moment in enumerate(moments):
        rows = 1 + (config.steps - 3) * i // len(moments)
        process, _ = start(run_loop, 0, folder, config)
        while process.is_alive() and count_rows(folder) < rows:
            time.sleep(0.002)
        left = saves(folder)  # by the process that was killed before
        while moment == "save" and process.is_alive() and not saves(folder) - left:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.002 if moment == "save" else 0.15))
        assert process.is_alive()
        process.kill()
        process.join()
        within += bool(saves(folder) - left)
        assert all(damage(path) is None for path in list_checkpoints(folder / "checkpoints"))
    run_world(1, run_loop, folder, config)
    assert within >= moments.count("save")


def test_kills_within_a_save_leave_the_run_as_it_would_be(tmp_path: Path):
    run_world(1, run_loop, tmp_path / "undisturbed", CONFIGURATION)
    kill_again_and_again(tmp_path / "killed", ["save", "any", "save"], CONFIGURATION, 0)
    assert_same_run(tmp_path / "undisturbed", tmp_path / "killed")


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path):
    config = replace(CONFIGURATION, steps=60, save_every=2)
    run_world(1, run_loop, tmp_path / "undisturbed", config)
    kill_again_and_again(tmp_path / "killed", ["any", "any", "any", "save"] * 5, config, 1)
    assert_same_run(tmp_path / "undisturbed", tmp_path / "killed")


@pytest.mark.slow
def test_a_long_run_takes_no_more_memory_at_its_end(tmp_path: Path):
    run_world(1, run_loop, tmp_path, replace(CONFIGURATION, steps=1000, save_every=50), deadline_s=1800)
    taken = [row["memory_gib"] for row in map(json.loads, (tmp_path / "speed.jsonl").read_text().splitlines())]
    assert min(taken) > 0.1, "torch alone takes more"
    assert statistics.median(taken[-200:]) == pytest.approx(statistics.median(taken[200:400]), rel=0.02)


def test_which_checkpoints_stay(tmp_path: Path):
    run = RunFolder(tmp_path, CONFIGURATION)
    for number, loss in [(2, 0.9), (4, 0.5), (6, 0.7), (8, 0.8), (10, 0.4), (11, 0.1), (12, 0.6), (14, 0.6)]:
        run_step = run.checkpoints / f"step_{number:08d}"
        row = {"step": number, "loss": loss, "accuracy": loss}
        (tmp_path / "held_out.jsonl").open("a").write(json.dumps(row) + "\n")
        if number % 2:
            continue  # measured, not saved
        run_step.mkdir()
        (run_step / "state.json").write_text("{}")
        run.tidy(keep=2, keep_every=6, best="held_out/loss")
        if number == 8:
            assert (tmp_path / "best").resolve().name == "step_00000004"
    assert [int(p.name[5:]) for p in list_checkpoints(run.checkpoints)] == [14, 12, 10, 6]
    found = look(tmp_path / "best")
    assert found.kind == "checkpoint" and found.run == tmp_path and (found.path / "state.json").is_file()
    assert found.path.resolve().name == "step_00000010"
    run.tidy(keep=9, keep_every=0, best="held_out/accuracy")
    assert (tmp_path / "best").resolve().name == "step_00000006"  # the highest of those that are left
    run.tidy(keep=1, keep_every=0, best="validation/strict")  # nothing of the kind was measured
    assert [int(p.name[5:]) for p in list_checkpoints(run.checkpoints)] == [14, 6] and (tmp_path / "best").exists()
    with pytest.raises(ValueError, match="held_out/NAME or validation/NAME"):
        replace(CONFIGURATION, best="loss")
