"""Transformer Engine's layers and the attention backends against torch's: outputs, gradients, milliseconds.

Every backend sees the same bf16 numbers. The error is relative to the same computation by torch in fp32; a backend
passes if its error is at most twice that of torch in bf16. What cannot run here is skipped, with the reason.
"""

import statistics
from collections.abc import Callable

import torch

from bench.gpu.measure import here, timed

HEADS, HEAD_DIM, REPEATS = 24, 128, 10
LENGTHS = (7145, 4352, 1280, 300)
"""Tokens of the segments that attention runs in: 1328, 1024 and 512 px with prompts, and an odd one."""


def case(tiny: bool) -> dict:
    heads, dim, lengths = (2, 16, (40, 24, 7)) if tiny else (HEADS, HEAD_DIM, LENGTHS)
    torch.manual_seed(0)
    found = compare("attention", *attention(here(), heads, dim, lengths))
    found |= compare("linear", *linear(here(), heads * dim, sum(lengths)))
    if failed := [name for name, value in found.items() if value == "beyond bf16 error"]:
        raise ValueError(f"beyond bf16 error: {', '.join(failed)}; {found}")
    return found


def attention(device, heads: int, dim: int, lengths: tuple[int, ...]) -> tuple:
    """(inputs, {name: function of the inputs, or why there is none})."""
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


def compare(what: str, inputs: tuple, functions: dict) -> dict[str, float | str]:
    """Of each backend, the first of which is torch's: its largest error and milliseconds, or why it was skipped."""
    reference, direction = next(iter(functions.values())), None
    exact, allowed, found = [], [], {}
    for name, function in {"fp32": reference, **functions}.items():
        if isinstance(function, str):
            found[f"{what} {name}"] = f"skipped: {function}"
            continue
        given = [x.float() if name == "fp32" else x for x in inputs]
        results = run_once(function, given, direction)
        if name == "fp32":
            exact, direction = results, results[0]
            continue
        errors = [((r.float() - e).norm() / e.norm()).item() for r, e in zip(results, exact, strict=True)]
        allowed = allowed or [2 * e for e in errors]
        if any(e > a for e, a in zip(errors, allowed, strict=True)):
            found[f"{what} {name}"] = "beyond bf16 error"
            continue
        work = lambda f=function, g=given, d=direction: run_once(f, g, d)  # noqa: E731
        found[f"{what} {name} ms"] = 1e3 * statistics.median(timed(work)[0] for _ in range(REPEATS))
        found[f"{what} {name} error"] = max(errors)
    return found


def run_once(function: Callable, given: list, direction) -> list:
    """[output, gradients of the inputs]; `direction` is the output's gradient (default: the output)."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = function(*leaves)
    out.backward((out if direction is None else direction).detach().to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves)]
