"""Transformer Engine's layers and the attention backends against torch's: outputs and gradients, and milliseconds.

Every backend sees the same bf16 numbers. The error is relative to the same computation by torch in fp32; a backend
passes if its error is at most twice that of torch in bf16. What cannot run here is skipped, with the reason.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

try:
    from command_line import UserError, run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config:
    heads: int = 24
    head_dim: int = 128
    lengths: tuple[int, ...] = (7145, 4352, 1280, 300)
    """Tokens of the segments that attention runs in: 1328, 1024 and 512 px with prompts, and an odd one."""
    repeats: int = 10
    tiny: bool = False
    """Small shapes, on whatever device there is."""


def main(config: Config) -> None:
    import torch

    cuda = torch.cuda.is_available()
    if not cuda and not config.tiny:
        raise UserError("no GPU here; --tiny runs what can run on the CPU")
    device = torch.device("cuda" if cuda else "cpu")
    heads, dim, lengths = (2, 16, (40, 24, 7)) if config.tiny else (config.heads, config.head_dim, config.lengths)
    torch.manual_seed(0)
    failed = compare("attention", *attention(device, heads, dim, lengths), config)
    failed += compare("linear", *linear(device, heads * dim, sum(lengths)), config)
    if failed:
        raise UserError(f"beyond bf16 error: {', '.join(failed)}")


def attention(device, heads: int, dim: int, lengths: tuple[int, ...]) -> tuple:
    """(inputs, {name: function of the inputs, or why there is none})."""
    import torch

    from model.packing import Pack, SampleShape
    from training.engine.ops import attention_backend

    pack = Pack.of([SampleShape(1, (1, 1, n - 1)) for n in lengths], align=1).to(device)
    inputs = tuple(torch.randn(3, sum(lengths), heads, dim, device=device, dtype=torch.bfloat16))
    backends = {}
    for name in ("sdpa", "flash", "te"):
        try:
            backend = attention_backend(name, device.type)
            backends[name] = lambda q, k, v, backend=backend: backend(q, k, v, pack)
        except ImportError as missing:
            backends[name] = str(missing)
    if device.type == "cpu":
        backends["flash"] = "the kernel needs CUDA"
    return inputs, backends


def linear(device, width: int, tokens: int) -> tuple:
    """The same for a layer width -> 4 width."""
    import torch
    import torch.nn.functional as F

    new = lambda *shape: torch.randn(shape, device=device, dtype=torch.bfloat16)  # noqa: E731
    inputs = (new(tokens, width), new(4 * width, width) * width**-0.5, new(4 * width))
    try:
        import transformer_engine.pytorch as te

        layer = te.Linear(width, 4 * width, params_dtype=torch.bfloat16, device=device)
        engine = lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,))  # noqa: E731
    except ImportError as missing:
        engine = str(missing)
    return inputs, {"torch": F.linear, "te": engine}


def compare(what: str, inputs: tuple, functions: dict, config: Config) -> list[str]:
    """Print a line a backend; the first is torch's. Returns the names of those that are too far off."""
    reference, direction = next(iter(functions.values())), None
    exact, failed, allowed = [], [], []
    for name, function in {"fp32": reference, **functions}.items():
        if isinstance(function, str):
            print(f"{what:10} {name:6} skipped: {function}")
            continue
        given = [x.float() if name == "fp32" else x for x in inputs]
        results, _ = run_once(function, given, direction)
        if name == "fp32":
            exact, direction = results, results[0]
            continue
        errors = [((r.float() - e).norm() / e.norm()).item() for r, e in zip(results, exact, strict=True)]
        allowed = allowed or [2 * e for e in errors]
        if any(e > a for e, a in zip(errors, allowed, strict=True)):
            failed.append(f"{what} {name}")
        ms = 1e3 * statistics.median(run_once(function, given, direction)[1] for _ in range(config.repeats))
        written = " ".join(f"{e:.1e}" for e in errors)
        print(f"{what:10} {name:6} {ms:9.2f} ms   errors of output, gradients: {written}")
    return failed


def run_once(function: Callable, given: list, direction) -> tuple[list, float]:
    """([output, gradients of the inputs], seconds); `direction` is the output's gradient (default: the output)."""
    import torch

    leaves = [x.detach().clone().requires_grad_() for x in given]
    synchronize = torch.cuda.synchronize if leaves[0].is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    out = function(*leaves)
    out.backward((out if direction is None else direction).detach().to(out.dtype))
    synchronize()
    return [out.detach(), *(x.grad for x in leaves)], time.perf_counter() - start


if __name__ == "__main__":
    run(main, Config)
