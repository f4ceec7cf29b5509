"""On a GPU: blocks of the 20B width at 1328 px in bf16, ours against diffusers', eager and compiled, with MFU.

Model FLOPs utilisation is against the matrix-product ceiling measured on the same card (8192 x 8192 x 8192, bf16), not
against the data sheet. Also runs on a CPU with `--tiny`, to check the script.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    from command_line import run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config:
    layers: int = 4
    side_px: int = 1328
    txt: int = 256
    batch: int = 1
    repeats: int = 10
    tiny: bool = False
    """A tiny model and picture, on whatever device there is."""
    out: Path | None = None
    """Also write the rows as JSON."""


def main(config: Config) -> None:
    import torch
    from diffusers import QwenImageTransformer2DModel

    from model.config import PRESETS, MMDiTConfig
    from model.diffusers_io.names import to_diffusers
    from model.mmdit import MMDiT
    from model.packing import pack_inputs, patchify

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not config.tiny:
        raise ValueError("no GPU here; --tiny runs the script on the CPU")
    shape = PRESETS["tiny"] if config.tiny else MMDiTConfig(num_layers=config.layers)
    side, dtype = (8, torch.float32) if config.tiny else (config.side_px // 16, torch.bfloat16)
    torch.manual_seed(0)
    with device:
        ours = MMDiT(shape).to(dtype)
        theirs = QwenImageTransformer2DModel(**{k: v for k, v in asdict(shape).items() if k != "rope"}).to(dtype)
        theirs.load_state_dict({to_diffusers(n): p.detach() for n, p in ours.named_parameters()})
        latents = [torch.randn(16, 1, 2 * side, 2 * side) for _ in range(config.batch)]
        texts = [torch.randn(config.txt, shape.joint_attention_dim, dtype=dtype) for _ in latents]
        sigma = torch.full((config.batch,), 0.5)
    inputs = pack_inputs(latents, texts, sigma)
    batch = dict(
        hidden_states=torch.stack([patchify(x).to(dtype) for x in latents]),
        encoder_hidden_states=torch.stack(texts),
        timestep=sigma.to(dtype),
        img_shapes=[[(1, side, side)]] * config.batch,
        return_dict=False,
    )

    def train(forward: Callable, model: torch.nn.Module) -> Callable[[], None]:
        def work() -> None:
            model.zero_grad(set_to_none=True)
            forward().float().square().mean().backward()

        return work

    ceiling = matmul_flops(device, dtype, 256 if config.tiny else 8192)
    flops = 3 * shape.forward_flops(side * side, config.txt, config.batch)
    print(
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}: {ceiling / 1e12:.1f} TFLOP/s in products"
    )
    works = {
        "ours, eager": train(lambda: ours(inputs), ours),
        "diffusers, eager": train(lambda: theirs(**batch)[0], theirs),
    }
    rows = alternate(works, device, config.repeats, flops, ceiling)
    if not config.tiny:
        for block in (*ours.blocks, *theirs.transformer_blocks):
            block.compile()
        compiled = {name.replace("eager", "compiled"): work for name, work in works.items()}
        rows += alternate(compiled, device, config.repeats, flops, ceiling)
    if config.out:
        config.out.write_text(json.dumps(rows, indent=2) + "\n")


def alternate(works: dict[str, Callable], device, repeats: int, flops: float, ceiling: float) -> list[dict]:
    seconds = {name: [] for name in works}
    peak = {}
    for repeat in range(repeats + 2):
        for name, work in works.items():
            elapsed, peak[name] = timed(work, device)
            if repeat >= 2:  # the first rounds warm up and compile
                seconds[name].append(elapsed)
    rows = []
    for name, values in seconds.items():
        median, spread = statistics.median(values), max(values) - min(values)
        row = {
            "who": name,
            "median_s": median,
            "spread_s": spread,
            "mfu": flops / median / ceiling,
            "peak_gib": peak[name],
        }
        time_ms = f"{median * 1e3:9.1f} ms (spread {spread * 1e3:.1f})"
        print(f"{name:20} {time_ms}  MFU {row['mfu']:.2f}  peak {peak[name]:.1f} GiB")
        rows.append(row)
    return rows


def timed(work: Callable[[], None], device) -> tuple[float, float]:
    """(seconds, peak GiB) of one run."""
    import torch

    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def matmul_flops(device, dtype, n: int) -> float:
    """FLOP/s of an n x n x n product, the best of 10."""
    import torch

    a, b = torch.randn(2, n, n, device=device, dtype=dtype).unbind()
    return 2 * n**3 / min(timed(lambda: a @ b, device)[0] for _ in range(10))


if __name__ == "__main__":
    run(main, Config)
