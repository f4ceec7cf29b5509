"""What a forward pass of a small MMDiT leaves behind in memory."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import LoRAConfig, MMDiTConfig
from model.lora import add_adapters
from model.mmdit import MMDiT
from model.packing import ModelInputs, pack_inputs
from training.cost.activations import Microbatch
from training.engine.blocks import prepare_blocks

NARROW = MMDiTConfig(
    num_layers=3, num_attention_heads=2, attention_head_dim=32, joint_attention_dim=32, axes_dims_rope=(8, 12, 12)
)
WIDE = MMDiTConfig(
    num_layers=4, num_attention_heads=6, attention_head_dim=48, joint_attention_dim=64, axes_dims_rope=(8, 20, 20)
)


class Alive(TorchDispatchMode):
    """What operations have made and something still holds, tensors of `old` apart; with `peaks`, the most at a time."""

    def __init__(self, old: Iterable[Tensor], peaks: bool = False):
        super().__init__()
        self.old, self.peaks, self.peak = {t.untyped_storage()._cdata: t for t in old}, peaks, 0
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.old:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self.peaks:
            self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self) -> int:
        self.storages = {at: held for at, held in self.storages.items() if not held[0].expired()}
        return sum(size for _, size in self.storages.values())


def packed(batch: Microbatch, config: MMDiTConfig, alike: bool) -> ModelInputs:
    """Inputs of a microbatch. Not `alike`, one picture has 12 tokens more than another: none is padded then."""
    more = [0] * batch.samples if alike else [12, -12, *[0] * (batch.samples - 2)]
    sides = [2 * ((batch.img + m) // 4) for m in more]
    latents = [torch.randn(config.out_channels, 1, 8, side) for side in sides]
    texts = [torch.randn(batch.txt, config.joint_attention_dim) for _ in latents]
    return pack_inputs(latents, texts, torch.linspace(0.2, 0.8, batch.samples))


def built(config: MMDiTConfig, dtype: torch.dtype, lora: LoRAConfig | None, recompute: str = "none") -> MMDiT:
    model = MMDiT(config).initialize(0).to(dtype)
    if lora is not None:
        add_adapters(model, lora)
    prepare_blocks(model, False, recompute)
    return model


def held_after_forward(model: torch.nn.Module, inputs: ModelInputs, *old: Tensor) -> int:
    """Bytes that a forward pass leaves behind, its result and what is made once and for all apart."""
    with torch.no_grad():
        model(inputs)
    with Alive([*model.parameters(), *old, inputs.img, inputs.txt, inputs.sigma]) as alive:
        out = model(inputs)
    return alive.bytes() - out.nbytes
