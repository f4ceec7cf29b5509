"""Producers and a trainer that are killed again and again: every sample is trained on exactly once in each pass.

A round: two producers and a trainer on one folder, real networks of toy size, and a seeded sequence of misfortunes.
What counts is the lineage of the last checkpoint: the steps that it was made of, those undone by a kill left out.
"""

import os
import random
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from live_runs import BATCH, PASSES, SHARDS, counted, encode, train, write_shards
from worlds import start

from data_pipeline.shards import read_raw, shard_name

QUICK_ROUNDS = 10


@contextmanager
def small_disk(folder: Path, full: bool):
    """The folder on a file system of its own that is too small, if this process may mount one."""
    folder.mkdir()
    mounted = full and os.geteuid() == 0
    if mounted:
        command = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", folder]
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


def play(seed: int, folder: Path, components: Path, raw: Path, deadline_s: float = 60.0) -> None:
    """One round; AssertionError if a sample was missed or seen twice, or nothing moves."""
    rng = random.Random(seed)
    mine = folder / "raw"
    shutil.copytree(raw, mine)
    if rng.random() < 0.3:  # a tar that was cut while it was copied
        cut = mine / shard_name(rng.randrange(SHARDS))
        cut.write_bytes(cut.read_bytes()[: int(cut.stat().st_size * rng.uniform(0.2, 0.9))])
    keys = [s.key for shard in sorted(mine.glob("*.tar")) for s in read_raw(shard, lambda problem: None)]
    out, run = folder / "out", folder / "run"
    with small_disk(out, full=rng.random() < 0.2) as too_small:
        begin = {
            "producer a": lambda: start(encode, mine, components, out),
            "producer b": lambda: start(encode, mine, components, out),
            "trainer": lambda: start(train, out, run, len(keys)),
        }
        at_work = {name: begin[name]() for name in begin}
        end, misfortunes = time.monotonic() + deadline_s, rng.randint(2, 6)
        while at_work["trainer"][0].is_alive() or misfortunes:
            assert time.monotonic() < end, f"seed {seed}: nothing moves"
            time.sleep(rng.uniform(0.02, 0.3))
            if misfortunes:
                misfortunes -= 1
                what = rng.choice(["kill", "kill", "kill", "unclaim", "clock"])
                claims = sorted((out / "claims").glob("*.claim"))
                if what == "kill":
                    at_work[rng.choice(list(begin))][0].kill()
                elif claims and what == "unclaim":
                    rng.choice(claims).unlink(missing_ok=True)
                elif claims:
                    for claim in claims:
                        when = time.time() + rng.choice([-1e6, 1e6])
                        if claim.exists():
                            os.utime(claim, (when, when))
            elif too_small:
                subprocess.run(["mount", "-o", "remount,size=64m", out], check=True)
                too_small = False
            for name, (process, _) in list(at_work.items()):
                if not process.is_alive() and (process.exitcode != 0 or failed(at_work[name][1])):
                    at_work[name] = begin[name]()
        for process, _ in at_work.values():
            process.kill()
            process.join()
        whole, rest = divmod(PASSES * len(keys) // BATCH * BATCH, len(keys))
        seen = counted(run)
        assert max(seen.values()) == 1 and sum(seen.values()) == whole * len(keys) + rest, f"seed {seed}"
        for epoch in range(whole):
            assert {key for key, e in seen if e == epoch} == set(keys), f"seed {seed}: pass {epoch} is not whole"


def failed(receiver) -> bool:
    """Whether a process that ended by itself said that it had failed."""
    try:
        return not receiver.poll(0) or receiver.recv()[0] is not None
    except EOFError:
        return True


@pytest.fixture(scope="module")
def raw(tmp_path_factory, make_raw) -> Path:
    return write_shards(tmp_path_factory.mktemp("raw"), make_raw)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(int(os.environ.get("CHAOS_ROUNDS", QUICK_ROUNDS))))
def test_every_sample_is_trained_on_once_in_each_pass_whatever_happens(seed, tmp_path, components, raw):
    play(seed, tmp_path, components, raw)
