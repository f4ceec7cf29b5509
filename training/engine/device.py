"""Where a run computes: the device, the process groups, the number of threads.

megatron-core takes CUDA for granted. On a CPU machine `start` installs a shim: `torch.cuda.current_device` names the
CPU, and inside `megatron_region` device="cuda" means the CPU and `Tensor.type()` answers as on CUDA. With CUDA both
do nothing.
"""

import contextlib
import logging
import os
import resource
import threading
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import param_and_grad_buffer
from torch.overrides import TorchFunctionMode

import cpu_math  # noqa: F401
from training.engine.config import ParallelConfig

CPU = torch.device("cpu")
PATIENCE = timedelta(hours=2)
"""How long a process waits for its peers in a collective: one may be writing a checkpoint of hundreds of gigabytes, or
drawing the last of its pictures."""


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def megatron_region() -> contextlib.AbstractContextManager:
    """Context for calls into megatron-core that name CUDA: construction, optimizer steps, checkpoints."""
    return contextlib.nullcontext() if torch.cuda.is_available() else _CudaMeansCpu()


@dataclass(frozen=True)
class Layout:
    """This process's place: device, rank, and (rank, size, group) along each parallel axis."""

    device: torch.device
    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    sp: bool
    tp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    """Ranks that hold the same weights: data and context parallel."""
    host_group: dist.ProcessGroup | None
    """All ranks, over which the hosts exchange CPU tensors; None is the default group."""
    writers_group: dist.ProcessGroup
    """All ranks, over which their threads that write checkpoints agree."""

    @property
    def speaks(self) -> bool:
        """Whether this one, of the ranks that hold the same samples, asks and writes for them."""
        return self.tp_rank == self.cp_rank == 0


def start(parallel: ParallelConfig) -> Layout:
    """Set up device, threads and process groups; under torchrun one process of many, otherwise a world of one.

    May be called again with another layout. Raises ValueError if the world does not divide into the layout.
    """
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else CPU
    if cuda:
        # packs differ in size, which leaves fragments
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
    else:
        _install_cpu_shim()
    logging.getLogger("megatron").setLevel(logging.WARNING)

    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        alone = {} if {"RANK", "MASTER_ADDR"} <= os.environ.keys() else _world_of_one()
        dist.init_process_group(backend, timeout=PATIENCE, device_id=device if cuda else None, **alone)
    world, model = dist.get_world_size(), parallel.tp * parallel.cp
    if world % model:
        raise ValueError(
            f"{world} processes do not divide over tp {parallel.tp} x cp {parallel.cp}; "
            f"start a multiple of {model} with `torchrun --nproc-per-node N`"
        )
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    with megatron_region():
        parallel_state.initialize_model_parallel(
            parallel.tp,
            context_parallel_size=parallel.cp,
            distributed_timeout_minutes=int(PATIENCE.total_seconds() // 60),
        )
    return Layout(
        device=device,
        rank=dist.get_rank(),
        world_size=world,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel.tp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel.cp,
        sp=parallel.sp and parallel.tp > 1,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        host_group=dist.new_group(timeout=PATIENCE, backend="gloo") if cuda else None,
        writers_group=dist.new_group(timeout=PATIENCE, backend="gloo"),
    )


def _world_of_one() -> dict:
    return {"store": dist.HashStore(), "rank": 0, "world_size": 1}


def peak_memory(device: torch.device) -> int:
    """Bytes that were taken on a GPU at most since this was last asked; of a CPU, what the process has now."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def stop() -> None:
    """Take down all process groups; nothing happens if there are none."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _reduce_whole(mine: torch.Tensor, whole: torch.Tensor, **kwargs):
    """A reduce-scatter in place as an all-reduce: four times as fast on gloo, which knows no better reduce-scatter."""
    return dist.all_reduce(whole, **kwargs)


def _install_cpu_shim() -> None:
    torch.cuda.current_device = lambda: CPU
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *args, **kwargs: None
    param_and_grad_buffer.dist_reduce_scatter_func = _reduce_whole
    # Results depend on the number of threads, so it is set rather than left to whoever imports what.
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, os.cpu_count() // local_world)
    torch.set_num_threads(threads)
    torch.get_num_threads()  # settles this thread's number; without it, the next lines would change it
    # All other threads (the loader's, gloo's) compute alone: said in another thread, it holds for those that have not
    # computed yet. A second OpenMP team makes more threads than cores, and then OpenMP lets all sleep at each barrier:
    # a small model's step took 1.6 times as long.
    other = threading.Thread(target=torch.set_num_threads, args=(1,))
    other.start()
    other.join()
    # The gradient of an indexed tensor (a modulation row for each token) is summed in any order otherwise.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
