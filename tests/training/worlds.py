"""Run a function in several processes at once, each a rank of one gloo world, within a deadline.

The processes are forked from a server that has imported the engine, so that a world starts in a fraction of a second.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([
    "training.engine.step", "training.loop", "training.run_folder", "data_pipeline.loader", "data_pipeline.live",
    "data_pipeline.encoding", "vae.autoencoder", "model.conditioner",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
])  # fmt: skip


def run_world(size: int, function: Callable[..., Any], *args: Any, deadline_s: float = 120) -> list[Any]:
    """Results of function(rank, *args) of all ranks; AssertionError with the traceback if one fails or hangs."""
    with tempfile.TemporaryDirectory() as meeting:
        processes = [start(function, rank, *args, world=(rank, size, f"{meeting}/store")) for rank in range(size)]
        try:
            return collect(processes, deadline_s)
        finally:
            for process, _ in processes:
                process.kill()
                process.join()


def start(function: Callable[..., Any], *args: Any, world: tuple[int, int, str] = (0, 1, "")):
    """Begin function(*args) in a process of its own; returns (process, pipe of the result)."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_enter, args=(sender, world, function, args), daemon=True)
    process.start()
    sender.close()
    return process, receiver


def collect(processes: list, deadline_s: float) -> list[Any]:
    """Results of processes made by `start`."""
    end = time.monotonic() + deadline_s
    results: dict[int, Any] = {}
    waiting = {receiver: i for i, (_, receiver) in enumerate(processes)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
        assert ready, f"rank {sorted(waiting.values())} did not finish within {deadline_s} s"
        for receiver in ready:
            rank = waiting.pop(receiver)
            try:
                failure, results[rank] = receiver.recv()
            except EOFError:
                failure = "the process died"
            assert failure is None, f"rank {rank}: {failure}"
    return [results[i] for i in range(len(processes))]


def _enter(sender, world: tuple[int, int, str], function: Callable[..., Any], args: tuple) -> None:
    import torch
    import torch.distributed as dist

    rank, size, store = world
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        if size > 1:
            dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
        sender.send((None, function(*args)))
    except BaseException:
        sender.send((traceback.format_exc(), None))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
