"""The data of a run without flags: killed at any moment, the same command goes on, and other ranks wait for it."""

import fcntl
import io
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.dataset import EncodedDataset
from data_pipeline.sample import RawSample
from data_pipeline.shards import write_raw
from posttrain.sft import Config
from training import demo_data
from training.source import BASE
from training.start import TOY_VALIDATION


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which the demo's pictures are made and nothing is encoded."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    rng, samples = np.random.default_rng(0), []
    for i in range(100):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(file, "PNG")
        samples.append(RawSample(f"k{i}", file.getvalue(), "png", {"caption": f"noise {i}"}))
    (demo_data.FOLDER / "raw").mkdir(parents=True)
    write_raw(demo_data.FOLDER / "raw" / demo_data.SHARD, samples)
    return tmp_path


def start(code: str, rank: int = 0) -> subprocess.Popen:
    code = f"from training import demo_data; {code}"
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"RANK": str(rank)})


def wait_until(condition, deadline_s: float = 300) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_making_goes_on_and_other_ranks_wait_for_its_end(begun: Path):
    encoded = demo_data.FOLDER / "encoded-64"
    first = start("demo_data.demo_data(64)")
    wait_until(lambda: (encoded / "dataset.json").exists() or list(encoded.glob(".tmp-*.tar")))
    first.kill()
    first.wait()
    with pytest.raises(ValueError, match="no encoded data set"):
        EncodedDataset(encoded)
    opens = "from data_pipeline.dataset import EncodedDataset; EncodedDataset(demo_data.demo_data(64))"
    other = start(opens, rank=1)
    try:
        assert demo_data.demo_data(64) == encoded
        assert len(EncodedDataset(encoded)) == 100
        assert other.wait(300) == 0
    finally:
        other.kill()


@pytest.mark.parametrize("named", [[], ["--init", str(BASE)]])
def test_a_plan_names_the_data_and_makes_none(begun: Path, named: list[str]):
    config = replace(Config.defaults(named), dry_run=True).completed()
    assert config.data == (demo_data.encoded_folder(64),) and not config.data[0].exists()


@pytest.mark.parametrize("given, kept", [(TOY_VALIDATION, None), ("mine.py:Mine", "mine.py:Mine")])
def test_only_the_shapes_validation_yields_to_own_pictures(given: str, kept: str | None, tmp_path: Path):
    config = replace(Config.defaults([]), dry_run=True, pictures=tmp_path, validation=given, out=tmp_path / "run")
    assert config.completed().validation == kept


def test_a_data_set_without_its_shards_is_not_taken_for_one(begun: Path, monkeypatch: pytest.MonkeyPatch):
    """As an older version could leave it."""
    encoded, ran = demo_data.FOLDER / "encoded-64", []
    encoded.mkdir()
    (encoded / "dataset.json").write_text("{}")

    def run(script: str, *arguments: object) -> None:
        ran.append(script)
        (encoded / demo_data.SHARD).touch()

    monkeypatch.setattr(demo_data, "run_script", run)
    demo_data.demo_data(64)
    assert ran == ["data_pipeline/produce.py"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel to kill the children")
def test_what_a_killed_process_began_dies_with_it(begun: Path):
    (begun / "slow.py").write_text(
        "import fcntl, time; file = open('held', 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "file.write('x'); file.flush(); time.sleep(600)"
    )
    parent = start(f"demo_data.run_script({str(begun / 'slow.py')!r})")
    wait_until(lambda: (begun / "held").exists() and (begun / "held").read_text())
    parent.kill()
    parent.wait()

    def is_free() -> bool:
        try:
            with open(begun / "held") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
        except BlockingIOError:
            return False

    wait_until(is_free, 60)
