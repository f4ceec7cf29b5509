"""On a CPU, one thread computes with all cores: those of the loader and of gloo open no OpenMP teams of their own."""

import os
import subprocess
import sys

import pytest

COUNT = """
import os, threading, torch
from training.engine import device
from training.engine.config import ParallelConfig

device.start(ParallelConfig())
work = lambda: torch.ones(1 << 20).mul_(2).sum()
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
work()
print(threads() - before, torch.get_num_threads())
before = threads()
alive = threading.Event()
other = threading.Thread(target=lambda: (work(), done.set(), alive.wait()))
done = threading.Event()
other.start()
done.wait()
torch.distributed.all_gather([torch.empty(1 << 20)], torch.ones(1 << 20))
print(threads() - before, torch.get_num_threads())
alive.set()
other.join()
device.stop()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_other_threads_compute_alone():
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    ran = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, env=environment, check=True)
    assert ran.stdout.split("\n")[:2] == ["2 3", "1 3"]  # the team of this thread; the other thread itself
