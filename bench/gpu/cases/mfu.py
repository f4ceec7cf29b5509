"""Blocks of the 20B width at 1328 px in bf16, forward and backward, ours against diffusers', eager and compiled.

Model FLOPs utilisation is against the product of matrices measured on the same card, not against the data sheet. On
Hopper both sides run the same attention: cuDNN's, by priority.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch

from bench.gpu.measure import alternate, flat, here, matmul_flops
from bench.gpu.twins import twins
from model.config import PRESETS, MMDiTConfig
from model.packing import pack_inputs, patchify

LAYERS, SIDE_PX, TXT = 4, 1328, 256


def case(tiny: bool) -> dict:
    shape, dtype = (PRESETS["tiny"], torch.float32) if tiny else (MMDiTConfig(num_layers=LAYERS), torch.bfloat16)
    side, txt = (8, 16) if tiny else (SIDE_PX // 16, TXT)
    torch.manual_seed(0)
    with here():
        ours, theirs = twins(shape, dtype)
        latent, text = torch.randn(16, 1, 2 * side, 2 * side), torch.randn(txt, shape.joint_attention_dim, dtype=dtype)
        sigma = torch.full((1,), 0.5)
    inputs = pack_inputs([latent], [text], sigma)
    batch = dict(
        hidden_states=patchify(latent).to(dtype)[None], encoder_hidden_states=text[None], timestep=sigma.to(dtype),
        img_shapes=[[(1, side, side)]], return_dict=False,
    )  # fmt: skip
    ceiling = matmul_flops(dtype, 256 if tiny else 8192)
    flops = 3 * shape.forward_flops(side * side, txt)
    works = {
        "ours": training(ours, lambda: ours(inputs)),
        "diffusers": training(theirs, lambda: theirs(**batch)[0]),
    }
    rows = {f"{name}, eager": row for name, row in alternate(works, 3 if tiny else 10).items()}
    if not tiny:
        for block in (*ours.blocks, *theirs.transformer_blocks):
            block.compile()
        rows |= {f"{name}, compiled": row for name, row in alternate(works).items()}
    for row in rows.values():
        row["mfu"] = flops / row["seconds"] / ceiling
    best = {name: min(r["seconds"] for who, r in rows.items() if who.startswith(name)) for name in works}
    return {"ceiling_tflops": ceiling / 1e12, "ratio": best["diffusers"] / best["ours"], **flat(rows)}


def training(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Forward and backward of a model."""

    def work() -> None:
        model.zero_grad(set_to_none=True)
        with attention():
            forward().float().square().mean().backward()

    return work


def attention():
    """cuDNN's kernel before the others on Hopper, for both sides."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(kernels, set_priority=True)
