import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.sample import RawSample


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_entry(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """run_entry("data_pipeline/x.py", *flags): run an entry script in this process, which has the imports warm."""

    def call(script: str, *flags: object) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path[1:]])
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            code = end.code
        return subprocess.CompletedProcess(script, code, *capfd.readouterr())

    return call


@pytest.fixture
def kill_entry():
    """kill_entry(script, *flags, once): run an entry and kill -9 it, workers and all, as soon as `once()` is true."""

    def call(script: str, *flags: object, once: Callable[[], bool]) -> None:
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while not once() and process.poll() is None:
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    return call


@pytest.fixture(scope="session")
def photograph() -> np.ndarray:
    """uint8 [512, 512, 3]"""
    import skimage.data

    return skimage.data.astronaut()


@pytest.fixture(scope="session")
def make_raw(photograph: np.ndarray):
    """make_raw(n, seed): n crops of a photograph in many shapes, with captions."""

    def make(n: int, seed: int = 0) -> list[RawSample]:
        rng = np.random.default_rng(seed)
        samples = []
        for i in range(n):
            w, h = (int(rng.integers(40, 200)) for _ in range(2))
            x, y = int(rng.integers(0, 512 - w)), int(rng.integers(0, 512 - h))
            meta = {"caption": f"crop {i} at {x}, {y}", "source": "photo", "width": w, "height": h}
            samples.append(RawSample(f"s{seed}-{i:03d}", png(photograph[y : y + h, x : x + w]), "png", meta))
        return samples

    return make


@pytest.fixture(scope="session")
def components(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random text encoder and VAE."""
    import torch

    from model.tiny_components import write_tiny_components
    from vae.autoencoder import PRESETS, VAE

    folder = tmp_path_factory.mktemp("components")
    write_tiny_components(folder)
    torch.manual_seed(0)
    VAE(PRESETS["tiny"]).save(folder)
    return folder
