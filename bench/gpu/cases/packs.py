"""A batch of pictures of several sizes and prompts of several lengths: one pack, against diffusers with the same
pictures in batches of one size, texts padded with a mask. Forward and backward, 20B width."""

from itertools import groupby

import torch

from bench.gpu.cases.mfu import attention
from bench.gpu.measure import alternate, flat, here
from bench.gpu.twins import twins
from model.config import PRESETS, MMDiTConfig
from model.packing import pack_inputs, patchify

SIZES = [(80, 80), (64, 48), (64, 48), (40, 40), (40, 40), (40, 40), (32, 48), (32, 48)]
"""Latents of 640 x 640 to 256 x 384 pixels."""
TEXTS = [300, 24, 180, 60, 12, 90, 220, 35]


def case(tiny: bool) -> dict:
    shape, dtype = (PRESETS["tiny"], torch.float32) if tiny else (MMDiTConfig(num_layers=2), torch.bfloat16)
    sizes = [(h // 8 * 2, w // 8 * 2) for h, w in SIZES] if tiny else SIZES
    torch.manual_seed(0)
    with here():
        ours, theirs = twins(shape, dtype)
        latents = [torch.randn(16, 1, h, w) for h, w in sizes]
        texts = [torch.randn(n, shape.joint_attention_dim, dtype=dtype) for n in TEXTS]
        sigma = torch.linspace(0.2, 0.9, len(sizes))
    inputs = pack_inputs(latents, texts, sigma)

    def packed() -> None:
        ours.zero_grad(set_to_none=True)
        ours(inputs).float().square().mean().backward()

    def bucketed() -> None:
        theirs.zero_grad(set_to_none=True)
        for _, alike in groupby(range(len(sizes)), key=sizes.__getitem__):
            at = list(alike)
            longest = max(TEXTS[i] for i in at)
            fill = lambda t, n=longest: torch.cat([t, t.new_zeros(n - len(t), t.shape[1])])  # noqa: E731
            mask = torch.tensor([[j < TEXTS[i] for j in range(longest)] for i in at], device=here())
            out = theirs(
                hidden_states=torch.stack([patchify(latents[i]).to(dtype) for i in at]),
                encoder_hidden_states=torch.stack([fill(texts[i]) for i in at]),
                encoder_hidden_states_mask=mask,
                timestep=sigma[at].to(dtype),
                img_shapes=[[(1, sizes[i][0] // 2, sizes[i][1] // 2)] for i in at],
                return_dict=False,
            )[0]
            out.float().square().mean().backward()

    with attention():
        rows = alternate({"packed": packed, "bucketed": bucketed}, 3 if tiny else 10)
    padded = sum(max(TEXTS[i] for i in a) * len(a) for a in (list(g) for _, g in groupby(range(8), sizes.__getitem__)))
    tokens = sum(h * w // 4 for h, w in sizes) + sum(TEXTS)
    return {
        "tokens": tokens,
        "padding_saved": (padded - sum(TEXTS)) / (tokens + padded - sum(TEXTS)),
        "ratio": rows["bucketed"]["seconds"] / rows["packed"]["seconds"],
        "tokens_per_second": tokens / rows["packed"]["seconds"],
        **flat(rows),
    }
