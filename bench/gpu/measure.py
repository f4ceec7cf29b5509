"""Times and memory of work on a device."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def here() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(seconds, peak GiB of the device's memory) of one run; 0 GiB on a CPU."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def peak_mib(work: Callable[[], object]) -> float:
    """MiB that work takes at most: of a GPU what torch takes; else growth of the resident set (Linux: the kernel's
    high-water mark, reset before)."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_kib("VmRSS")
    work()
    return (_resident_kib("VmHWM") - before) / 1024


def _resident_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def alternate(works: dict[str, Callable[[], object]], repeats: int = 10, warm: int = 2) -> dict[str, dict[str, float]]:
    """Median seconds, spread and peak GiB of works that take turns, so that drift meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    peak = {}
    for repeat in range(repeats + warm):
        for name, work in works.items():
            elapsed, peak[name] = timed(work)
            if repeat >= warm:  # the first rounds compile
                seconds[name].append(elapsed)
    return {
        name: {
            "seconds": statistics.median(values),
            "spread_s": max(values) - min(values),
            "peak_gib": peak[name],
        }
        for name, values in seconds.items()
    }


def matmul_flops(dtype: torch.dtype, n: int) -> float:
    """FLOP/s of an n x n x n product on this device, the best of 10: what utilisation is held against."""
    a, b = torch.randn(2, n, n, device=here()).to(dtype).unbind()
    return 2 * n**3 / min(timed(lambda: a @ b)[0] for _ in range(10))


def flat(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """{"who": {"seconds": s}} -> {"who seconds": s}, rounded."""
    return {f"{who} {what}": float(f"{value:.4g}") for who, row in rows.items() for what, value in row.items()}
