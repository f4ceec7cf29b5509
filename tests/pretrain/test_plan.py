"""The plan's figures against what torch counts."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import MMDiTConfig
from model.mmdit import MMDiT
from model.packing import pack_inputs
from pretrain.plan import ACTIVATION_BYTES, plan
from pretrain.recipes import recipe

CONFIG = MMDiTConfig(num_layers=2, num_attention_heads=4, joint_attention_dim=64)


def inputs():
    return pack_inputs([torch.randn(16, 1, 32, 32)], [torch.randn(64, 64)], torch.tensor([0.5]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_plan_covers_the_activations_that_autograd_keeps(dtype: torch.dtype):
    kept = {}
    for layers in (2, 4):
        model = MMDiT(dataclasses.replace(CONFIG, num_layers=layers)).initialize(0).to(dtype)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}

        def keep(tensor, weights=weights, storages=storages):
            if tensor.untyped_storage().data_ptr() not in weights:
                storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(inputs())
        kept[layers] = sum(t.untyped_storage().nbytes() for t in storages.values())
    tokens = 16 * 16 + 64
    found = (kept[4] - kept[2]) / (2 * tokens * CONFIG.width)
    assert 0.7 * ACTIVATION_BYTES[dtype.itemsize] < found < 1.05 * ACTIVATION_BYTES[dtype.itemsize]


def test_flops_are_those_that_torch_counts():
    model = MMDiT(CONFIG).initialize(0)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(inputs())
    # The formula counts the last text branch, which is not run, but neither time embedding nor single-row products.
    assert CONFIG.forward_flops(16 * 16, 64) == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_layouts_share_the_memory(monkeypatch: pytest.MonkeyPatch):
    config = recipe(1328, "qwen-image")

    def total(world: int) -> float:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        return float(plan(config).split("memory a process: ")[1].split(" GiB")[0])

    assert total(4) > total(16) > total(128)
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match="6 processes do not divide over tp 4"):
        plan(config)
