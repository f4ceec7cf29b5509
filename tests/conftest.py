"""What tests of several rooms share lies beside the tests of the room it belongs to."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "training"))  # worlds: functions run as ranks of a gloo world


def pytest_configure(config: pytest.Config) -> None:
    """Hide CUDA, for tests run as on a CPU machine, in gloo worlds; `pytest -m gpu` leaves it in sight."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
