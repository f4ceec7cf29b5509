"""A small MMDiT with random weights everywhere, and one batch of four samples that have nothing in common."""

import hashlib
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

from data_pipeline.sample import EncodedSample
from model.config import LoRAConfig, MMDiTConfig
from model.lora import add_adapters
from model.mmdit import MMDiT
from model.ops import Ops, fill_weight, whole_shape
from training.flow_matching import VelocityMSE, per_sample_mean
from training.randomness import Randomness

CONFIG = MMDiTConfig(
    num_layers=2, num_attention_heads=4, attention_head_dim=16, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    zero_cond_t=True,
)  # fmt: skip

ADAPTERS = LoRAConfig(
    rank=4, alpha=8,
    targets=("q", "k", "v", "out", "mlp_in", "mlp_out", "mod", "img_in", "txt_in", "proj", "linear_1", "linear_2"),
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
    add_adapters(model, ADAPTERS)
    return model


def weight(name: str, shape: torch.Size) -> Tensor:
    """Random values for a whole weight, none zero: a function of its name."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return 1 + 0.1 * noise if name.endswith("norm.weight") else noise * (0.1 if noise.ndim == 1 else shape[-1] ** -0.5)


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Fill a model, or a rank's slice of one, with `weight`; adapters have no biases."""
    for name, _ in model.named_parameters():
        if not (".lora." in name and name.endswith("bias")):
            fill_weight(model, name, weight(name, whole_shape(model, name)))
    return model


def reference_gradients(
    build: Callable[..., nn.Module] = MMDiT, rounding: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Gradients of the mean loss of the batch by plain torch in one process, in fp64.

    With `rounding`, each weight is changed by up to half a unit of fp32's last place, at random. The sinusoids of time
    and of positions are constants here, in fp32 as everywhere.
    """
    model, batch = fill(build(CONFIG)).double(), samples()
    if rounding is not None:
        with torch.no_grad():
            for param in model.parameters():
                draw = 2 * torch.rand(param.shape, generator=rounding, dtype=param.dtype) - 1
                param.mul_(1 + draw * 2**-24)
    inputs, target = VelocityMSE().prepare(batch, Randomness(7), align=16)
    with mock.patch("model.fused.norm_rotate", _norm_rotate):
        output = model(inputs)
    assert output.dtype == torch.float64
    per_sample_mean((output - target) ** 2, inputs).mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def rounding_errors(build: Callable[..., nn.Module], exact: dict[str, Tensor], draws: int = 4) -> dict[str, float]:
    """How far each tensor's gradient moves, at most, when all weights move by up to half a unit of their last place.

    It is what rounding the weights to fp32 costs, however exact the arithmetic after that: a gradient whose terms
    cancel moves far. Measured in fp64, so it is the same on every machine.
    """
    generator = torch.Generator().manual_seed(0)
    moved = [reference_gradients(build, generator) for _ in range(draws)]
    return {n: max((m[n] - e).abs().max().item() for m in moved) for n, e in exact.items()}


def _norm_rotate(x: Tensor, weight: Tensor, eps: float, table: Tensor) -> Tensor:
    """`model.fused.norm_rotate` in the precision of x."""
    pairs = nn.functional.rms_norm(x, x.shape[-1:], weight, eps).unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(table.to(x.dtype))[:, None]
    return torch.view_as_real(turned).flatten(-2)


def backward(model: nn.Module, batch: list[EncodedSample]) -> float:
    """Add the gradient of the batch's mean loss, by plain torch; returns the loss."""
    objective = VelocityMSE()
    inputs, target = objective.prepare(batch, Randomness(7), align=16)
    total, count, _ = objective.loss(model, {}, inputs, target)
    (total / count).backward()
    return (total / count).item()
