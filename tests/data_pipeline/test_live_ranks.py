"""Ranks on a set that is still being made see what one process sees on the finished one, however they come and go."""

import itertools
import time
from pathlib import Path

import pytest
from live_runs import BATCH, PASSES, SAMPLES, SHARDS, encode, lineage, train, write_shards
from worlds import collect, run_world, start

from training.engine.checkpoint import list_checkpoints

DEADLINE_S = 120


@pytest.fixture(scope="module")
def raw(tmp_path_factory, make_raw) -> Path:
    return write_shards(tmp_path_factory.mktemp("raw"), make_raw)


@pytest.fixture(scope="module")
def whole(raw, components, tmp_path_factory) -> list:
    """What one process is trained on, step by step, on the finished set."""
    folder = tmp_path_factory.mktemp("whole")
    collect([start(encode, raw, components, folder / "data", 0)], DEADLINE_S)
    collect([start(train, folder / "data", folder / "run", SHARDS * SAMPLES, 0.0, 0.0)], DEADLINE_S)
    return lineage(folder / "run")


def test_one_process_on_the_finished_set_sees_each_sample_once_a_pass(whole):
    first = SHARDS * SAMPLES
    seen = [pair for step in whole for pair in step]
    assert len(seen) == PASSES * SHARDS * SAMPLES and len(set(seen)) == len(seen)
    assert {epoch for _, epoch in seen[: first - BATCH]} == {0}


def as_rank(rank: int, *args) -> None:
    train(*args)


def test_ranks_that_come_seconds_apart_lose_nothing(raw, components, whole, tmp_path):
    making = start(encode, raw, components, tmp_path / "data")
    run_world(4, as_rank, tmp_path / "data", tmp_path / "run", SHARDS * SAMPLES, 2.0, 0.0, deadline_s=DEADLINE_S)
    collect([making], DEADLINE_S)
    assert lineage(tmp_path / "run") == whole


def test_kills_before_the_first_shard_and_changes_of_layout_and_of_producers_change_nothing(
    raw, components, whole, tmp_path
):
    data, run, attempts = tmp_path / "data", tmp_path / "run", itertools.count()

    def begun(ranks: int) -> list:
        attempt = next(attempts)
        about = (data, run, SHARDS * SAMPLES, 0.0, 0.02, attempt)
        return [start(train, *about, world=(r, ranks, f"{tmp_path}/store-{attempt}")) for r in range(ranks)]

    early = begun(1)
    time.sleep(1.0)
    kill(early)  # it waits for a plan
    making = [start(encode, raw, components, data)]
    while not (data / "live.json").exists():
        time.sleep(0.001)
    kill(making)
    waiting = begun(2)
    time.sleep(2.0)
    kill(waiting)  # they wait for the first shard
    making = [start(encode, raw, components, data) for _ in range(2)]
    for ranks in (2, 1):
        training, before = begun(ranks), newest(run)
        while newest(run) < before + 4:
            time.sleep(0.005)
        kill(training)
        kill(making[:1])
    collect(begun(4), DEADLINE_S)
    collect(making[1:], DEADLINE_S)
    assert lineage(run) == whole


def kill(processes: list) -> None:
    for process, _ in processes:
        process.kill()
        process.join()


def newest(run: Path) -> int:
    """The last step of which there is a checkpoint; 0 for none."""
    return max((int(path.name.removeprefix("step_")) for path in list_checkpoints(run / "checkpoints")), default=0)
