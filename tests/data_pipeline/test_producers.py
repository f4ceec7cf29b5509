"""Where encoding runs makes no difference: by hand, in a thread, in processes beside, on Ray."""

import importlib.util
import time
from pathlib import Path

import pytest

from command_line import UserError
from data_pipeline.dataset import EncodedDataset
from data_pipeline.live import LiveDataset
from data_pipeline.producers import Producers, wait_for_plan
from data_pipeline.production import Production
from data_pipeline.shards import shard_name, write_raw


@pytest.fixture(scope="module")
def raw(tmp_path_factory, make_raw) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for i in range(4):
        write_raw(folder / shard_name(i), make_raw(5, seed=i))
    return folder


@pytest.fixture(scope="module")
def by_hand(raw, components, tmp_path_factory) -> Path:
    from data_pipeline.production import Production, produce

    out = tmp_path_factory.mktemp("by-hand")
    produce(Production(data=str(raw), components=components, out=out, res=32))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Of the files that are the same whenever they are written."""
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".tar", ".safetensors", ".json")]
    timed = (".index.json", "index.safetensors", "needed.json")
    return {p.name: p.read_bytes() for p in files if not p.name.endswith(timed)}


def finish(producers: Producers, out: Path, deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    wait_for_plan(out, None, lambda: producers.problem)
    while not (out / "dataset.json").exists():
        assert time.monotonic() < end and producers.problem is None, producers.problem
        time.sleep(0.1)
    producers.close()


@pytest.mark.parametrize(
    "where",
    [
        "thread",
        "2",
        pytest.param(
            "ray:2",
            marks=pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
        ),
    ],
)
def test_the_same_bytes_wherever_they_are_made(where, raw, by_hand, components, tmp_path):
    out = tmp_path / "out"
    finish(Producers(where, Production(str(raw), components=components, res=32, out=out, ahead=8)), out, 300)
    assert contents(out) == contents(by_hand)


def test_what_goes_wrong_with_a_producer_reaches_who_waits_for_it(raw, components, tmp_path):
    out = tmp_path / "out"
    producers = Producers("1", Production(str(raw / "missing"), components=components, res=32, out=out, ahead=8))
    with pytest.raises(UserError, match="no producer is at work on .*missing does not exist"):
        wait_for_plan(out, None, lambda: producers.problem)


def test_a_set_that_will_not_be_finished_says_why(raw, by_hand, tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.live.GRACE_S", 0.1)
    growing = tmp_path / "growing"
    growing.mkdir()
    for name in ("live.json", "empty.safetensors"):
        (growing / name).write_bytes((by_hand / name).read_bytes())
    with pytest.raises(ValueError, match=f"{shard_name(0)} will not be made: out of disk"):
        LiveDataset(growing, problem=lambda: "out of disk").rows(0)
    assert len(EncodedDataset(by_hand)) == 20


@pytest.mark.parametrize("where", ["0", "ray:", "gpu", "two", "ray:0"])
def test_places_that_are_none_are_refused(where, raw, components, tmp_path):
    with pytest.raises(UserError, match="expected thread, a number of processes, or ray:NUMBER"):
        Producers(where, Production(str(raw), components=components, res=32, out=tmp_path))
