"""Layers of another kind: frozen linears in int8 under adapters that train (QLoRA's idea, arXiv 2305.14314).

A weight takes a byte, with one scale an output channel; it is multiplied out when it is used, in the backward pass
again, so that neither memory nor the graph ever holds more than one layer of it.
"""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import EDIT_2511, case, random_model, relative, run_ours
from torch import Tensor, nn

from model.config import LoRAConfig
from model.lora import add_adapters
from model.mmdit import MMDiT
from model.ops import Ops


class Int8Linear(nn.Module):
    """A frozen linear layer whose weight is int8 [out, in] times a scale [out, 1]; takes whole weights when loaded."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=torch.int8), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False)
        self.register_buffer("scale", torch.ones(out_features, 1))
        self.register_load_state_dict_pre_hook(_quantise)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.scale, self.bias)


def _quantise(layer: Int8Linear, state: dict[str, Tensor], prefix: str, *_) -> None:
    weight = state[f"{prefix}weight"]
    if weight.is_floating_point():
        scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        state[f"{prefix}weight"], state[f"{prefix}scale"] = (weight / scale).round().to(torch.int8), scale


class _Product(torch.autograd.Function):
    """x (scale * weight)^T + bias, which keeps the weight as it is stored for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight * scale, bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        return dy @ (weight * scale), None, None, None


class Int8Ops(Ops):
    """The single-process layers with all large weights in int8; adapters are ordinary layers."""

    adapters = Ops()

    def column(self, in_features: int, out_features: int) -> nn.Module:
        return Int8Linear(in_features, out_features)

    row = replicated = modulation = column


CONFIG = LoRAConfig(rank=4, alpha=6, targets=("q", "k", "v", "out", "mlp_in", "mlp_out", "mod", "img_in"))
CASES = [case(EDIT_2511, 7, (1, 4, 4), ((1, 2, 3),)), case(EDIT_2511, 3, (1, 3, 5), seed=1)]


def quantised(dtype: torch.dtype = torch.float32) -> MMDiT:
    model = MMDiT(EDIT_2511, Int8Ops()).to(dtype)
    model.load_state_dict(random_model(EDIT_2511).state_dict(), strict=False)
    return model


def multiplied_out(model: MMDiT) -> MMDiT:
    """The plain model that a quantised one stands for."""
    state = {n: t for n, t in model.state_dict().items() if not n.endswith("scale")}
    for name, layer in model.named_modules():
        if isinstance(layer, Int8Linear):
            state[f"{name}.weight"] = layer.weight * layer.scale
    plain = MMDiT(EDIT_2511).to(model.dtype)
    plain.load_state_dict(state)
    return plain


def adapted(model: MMDiT) -> dict[str, Tensor]:
    """Add adapters with random numbers in both halves; what trains."""
    add_adapters(model, CONFIG, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, param in model.named_parameters():
        if name.endswith("lora.b.weight"):
            param.data.copy_(torch.randn(param.shape, generator=generator) * 0.1)
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def test_it_computes_nearly_what_the_whole_weights_do():
    model, whole = quantised(), random_model(EDIT_2511)
    for ours, theirs in zip(run_ours(model, CASES), run_ours(whole, CASES), strict=True):
        assert 0 < relative(ours, theirs) < 0.03
    size = lambda m: sum(t.numel() * t.element_size() for t in m.state_dict().values())  # noqa: E731
    assert size(model) < 0.4 * size(whole)


def test_its_own_state_loads_unchanged():
    model, again = quantised(), MMDiT(EDIT_2511, Int8Ops())
    again.load_state_dict(model.state_dict())
    assert torch.equal(run_ours(again, CASES)[0], run_ours(model, CASES)[0])


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-3)])
def test_adapters_train_as_over_the_weights_multiplied_out(dtype, within):
    models = [model := quantised(dtype), multiplied_out(model)]
    trained = [adapted(m) for m in models]
    assert trained[0].keys() == trained[1].keys() and len(trained[0]) > 50
    assert all(p.dtype == dtype for p in trained[0].values()) and model.dtype == dtype
    for m in models:
        sum((v * c.direction).mean() for v, c in zip(run_ours(m, CASES), CASES, strict=True)).backward()
    for name, param in trained[0].items():
        assert relative(param.grad, trained[1][name].grad) < within, name
    optimizer = torch.optim.AdamW(trained[0].values(), lr=1e-2)
    before = run_ours(model, CASES)[0].detach()
    optimizer.step()
    assert not torch.equal(run_ours(model, CASES)[0], before)


def test_the_graph_holds_no_weight_multiplied_out():
    model, kept = quantised(), []
    adapted(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run_ours(model, CASES)
    shapes = {layer.weight.shape for layer in model.modules() if isinstance(layer, Int8Linear)}
    shapes |= {shape[::-1] for shape in shapes}
    rank = CONFIG.rank
    large = [t for t in kept if t.shape in shapes and rank not in t.shape]
    assert large and all(t.dtype == torch.int8 for t in large)
