"""LoRA: low-rank adapters around our own layers, y = W x + scale B A x (arXiv 2106.09685), in any parallel layout.

A and B are made by the factories that made the layer (unless `Ops.adapters` says others), so that they are split as it
is: a column layer's adapter is a replicated A and a column B, a row layer's a row A and a replicated B. Communication
and gradients are then those of layers that are exact already. Names of the base weights do not change; an adapter adds
`<layer>.lora.a`, `.lora.b`.
"""

import torch
from torch import Tensor, nn

from model.config import LoRAConfig
from model.mmdit import MMDiT, named_generator
from model.ops import Ops, full_shape, local_shard, whole_shape

Adapters = dict[str, tuple[Tensor, Tensor]]
"""Layer -> whole (A [rank, in], B [out, rank])."""

_KIND = {
    **dict.fromkeys(("q", "k", "v", "mlp_in"), "column"),
    **dict.fromkeys(("out", "mlp_out"), "row"),
    **dict.fromkeys(("img_in", "txt_in", "proj"), "replicated"),
    **dict.fromkeys(("linear_1", "linear_2"), "vector"),
    "mod": "modulation",
}


class Adapter(nn.Module):
    """scale * B(A(x)); added to its layer's output by a forward hook."""

    def __init__(self, ops: Ops, kind: str, in_features: int, out_features: int, config: LoRAConfig):
        super().__init__()
        makers = {
            "column": (ops.replicated, ops.column),
            "row": (ops.row, ops.replicated),
            "replicated": (ops.replicated, ops.replicated),
            "vector": (ops.vector, ops.vector),
            "modulation": (ops.vector, ops.modulation),
        }
        make_a, make_b = makers[kind]
        self.a, self.b, self.scale = make_a(in_features, config.rank), make_b(config.rank, out_features), config.scale
        for linear in (self.a, self.b):  # the factories know no layer without bias
            nn.init.zeros_(linear.bias.requires_grad_(False))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.scale


@torch.no_grad()
def add_adapters(model: MMDiT, config: LoRAConfig, seed: int = 0) -> list[str]:
    """Freeze the model and give every target layer an adapter; returns the layers' names.

    B is zero, so the model computes what it did; A is uniform in +-1/sqrt(in), a function of (seed, its name) in every
    layout. Layers that nothing reads (the last text branch) get none. ValueError for a target that names no layer.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if any(f".{name}".endswith(f".{t}") for t in config.targets) and name.split(".")[-1] in _KIND
    }
    for target in config.targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise ValueError(
                f"no layer's name ends in {target!r}; there are {', '.join(_KIND)} (and img.q, txt.mod, ...)"
            )
    layers = {name: layer for name, layer in layers.items() if name not in _unread(model)}
    model.requires_grad_(False)
    for name, layer in layers.items():
        out_features, in_features = whole_shape(model, f"{name}.weight")
        adapter = Adapter(model.ops.adapters, _KIND[name.split(".")[-1]], in_features, out_features, config)
        layer.lora = adapter.to(layer.bias.device, model.dtype)
        layer.register_forward_hook(lambda module, args, output: output + module.lora(args[0]))
    initialize_adapters(model, seed)
    return list(layers)


@torch.no_grad()
def initialize_adapters(model: MMDiT, seed: int) -> None:
    """Start the adapters over: see `add_adapters`."""
    for name, adapter in adapters_of(model).items():
        weight = adapter.a.weight
        shape, generator = full_shape(weight), named_generator(seed, f"{name}.lora.a.weight")
        full = (torch.rand(shape, generator=generator) * 2 - 1) / shape[1] ** 0.5
        weight.copy_(local_shard(weight, full))
        adapter.b.weight.zero_()


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model, by their layers' names."""
    return {name.removesuffix(".lora"): m for name, m in model.named_modules() if isinstance(m, Adapter)}


def _unread(model: MMDiT) -> set[str]:
    """Layers after the last attention of the text stream: frozen and never run."""
    return {f"blocks.{len(model.blocks) - 1}.txt.{layer}" for layer in ("out", "mlp_in", "mlp_out")}


@torch.no_grad()
def load_adapters(model: MMDiT, adapters: Adapters) -> None:
    """Fill the adapters that `add_adapters` made, or this rank's slices. ValueError names one that does not match.

    Adapters of layers that nothing reads, which other trainers write, are passed over.
    """
    adapters = {name: pair for name, pair in adapters.items() if name not in _unread(model)}
    layers = adapters_of(model)
    if odd := set(layers) ^ set(adapters):
        raise ValueError(f"adapters of the model and of the file differ, first at {min(odd)}")
    for name, pair in adapters.items():
        for linear, full in zip((layers[name].a, layers[name].b), pair, strict=True):
            if full_shape(linear.weight) != full.shape:
                raise ValueError(f"{name}: an adapter of {tuple(full.shape)} for {tuple(full_shape(linear.weight))}")
            linear.weight.copy_(local_shard(linear.weight, full))


def split_adapters(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], Adapters]:
    """Whole weights of an adapted model -> (the base's, the adapters)."""
    base = {name: w for name, w in weights.items() if ".lora." not in name}
    names = [name.removesuffix(".lora.a.weight") for name in weights if name.endswith(".lora.a.weight")]
    return base, {n: (weights[f"{n}.lora.a.weight"], weights[f"{n}.lora.b.weight"]) for n in names}


@torch.no_grad()
def merge(weights: dict[str, Tensor], adapters: Adapters, scale: float) -> dict[str, Tensor]:
    """Base weights with the adapters added in: W + scale B A, computed in fp32, returned in W's dtype and place.

    ValueError names an adapter that fits no weight.
    """
    merged = dict(weights)
    for name, (a, b) in adapters.items():
        weight = weights.get(f"{name}.weight")
        if weight is None or weight.shape != (len(b), a.shape[1]):
            raise ValueError(f"the adapter of {name}, {a.shape[1]} -> {len(b)} channels, fits no layer of this model")
        change = scale * (b.to(weight.device).float() @ a.to(weight.device).float())
        merged[f"{name}.weight"] = (weight.float() + change).to(weight.dtype)
    return merged
