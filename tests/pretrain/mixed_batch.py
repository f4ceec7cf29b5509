"""A small MMDiT with random weights everywhere, and one batch of four samples that have nothing in common."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from data_pipeline.sample import EncodedSample
from model.config import LoRAConfig, MMDiTConfig
from model.lora import add_adapters
from model.mmdit import MMDiT
from model.ops import Ops, full_shape, local_shard
from pretrain.objective import VelocityMSE
from pretrain.randomness import Randomness

CONFIG = MMDiTConfig(
    num_layers=2, num_attention_heads=4, attention_head_dim=16, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    zero_cond_t=True,
)  # fmt: skip


def samples(epoch: int = 0) -> list[EncodedSample]:
    """Targets of 8 x 8 to 12 x 10 latents, prompts of 3 to 19 tokens, 0 to 2 references."""
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    sizes = [((8, 8), 5, []), ((4, 10), 19, [(6, 4)]), ((12, 10), 3, []), ((6, 6), 8, [(4, 4), (2, 8)])]
    return [
        EncodedSample(
            key=f"sample-{i}",
            latent=normal(16, 1, *size),
            txt=normal(length, 24),
            references=[normal(16, 1, *r) for r in references],
            txt_empty=normal(2, 24),
            epoch=epoch,
        )
        for i, (size, length, references) in enumerate(sizes)
    ]


def with_adapters(config: MMDiTConfig, ops: Ops | None = None) -> MMDiT:
    """A frozen model whose every linear layer has an adapter."""
    model = MMDiT(config, ops)
    targets = ("q", "k", "v", "out", "mlp_in", "mlp_out", "mod", "img_in", "txt_in", "proj", "linear_1", "linear_2")
    add_adapters(model, LoRAConfig(rank=4, alpha=8, targets=targets))
    return model


def weight(name: str, shape: torch.Size) -> Tensor:
    """Random values for a whole weight, none zero: a function of its name."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return 1 + 0.1 * noise if name.endswith("norm.weight") else noise * (0.1 if noise.ndim == 1 else shape[-1] ** -0.5)


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Fill a model, or a rank's slice of one, with `weight`; adapters have no biases."""
    for name, param in model.named_parameters():
        if not (".lora." in name and name.endswith("bias")):
            param.copy_(local_shard(param, weight(name, full_shape(param))))
    return model


def reference_gradients(build: Callable[..., nn.Module] = MMDiT) -> dict[str, Tensor]:
    """Gradients of the mean loss of the batch by plain torch in one process."""
    model = fill(build(CONFIG))
    backward(model, samples())
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def backward(model: nn.Module, batch: list[EncodedSample]) -> float:
    """Add the gradient of the batch's mean loss, by plain torch; returns the loss."""
    objective = VelocityMSE()
    inputs = objective.prepare(batch, Randomness(7), None, align=16)
    total, count, _ = objective.loss(model(inputs), batch, inputs)
    (total / count).backward()
    return (total / count).item()
