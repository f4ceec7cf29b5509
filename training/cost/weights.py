"""The weights of an MMDiT by layer: who trains, how many a rank holds, in how many bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

from model.config import LoRAConfig, MMDiTConfig

STREAMS = ("img", "txt")
AFTER_ATTENTION = ("out", "mlp_in", "mlp_out")

QUANTIZED_BYTES = {"none": None, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0, "fp8": 1.0}
"""Bytes of a block's weight as it is stored: nf4 with a byte of scale for 64 weights, itself scaled in 256s; int8 and
fp8 also have an fp32 scale for each output channel."""


@dataclass(frozen=True)
class Linear:
    """One linear layer; `kind` is the factory in `model.ops.Ops` that makes it, which says how ranks share it."""

    name: str
    kind: Literal["column", "row", "replicated", "vector", "modulation"]
    inputs: int
    outputs: int

    def held(self, tp: int) -> float:
        """Weights and biases that one of `tp` tensor-parallel ranks holds."""
        weights = self.inputs * self.outputs
        if self.kind in ("column", "modulation"):
            return (weights + self.outputs) / tp
        return weights / tp + self.outputs if self.kind == "row" else weights + self.outputs

    def adapter(self, rank: int, tp: int) -> float:
        """Weights of its adapter (A, B) that one of `tp` ranks holds (see `model/lora.py`)."""
        a = rank * self.inputs / (tp if self.kind == "row" else 1)
        b = rank * self.outputs / (tp if self.kind in ("column", "modulation") else 1)
        return a + b


@cache
def linears(model: MMDiTConfig) -> dict[str, Linear]:
    """Every linear layer, by the name that `model.mmdit.MMDiT` gives it."""
    return {layer.name: layer for layer in _linears(model)}


@cache
def held(model: MMDiTConfig, tp: int) -> dict[str, float]:
    """Weights of every linear layer that a rank of `tp` holds."""
    return {name: layer.held(tp) for name, layer in linears(model).items()}


def _linears(model: MMDiTConfig) -> Iterator[Linear]:
    d = model.width
    yield Linear("img_in", "replicated", model.in_channels, d)
    yield Linear("txt_in", "replicated", model.joint_attention_dim, d)
    yield Linear("time.linear_1", "vector", 256, d)
    yield Linear("time.linear_2", "vector", d, d)
    for block in range(model.num_layers):
        for stream in STREAMS:
            at = f"blocks.{block}.{stream}"
            yield Linear(f"{at}.mod", "modulation", d, 6 * d)
            yield from (Linear(f"{at}.{name}", "column", d, d) for name in ("q", "k", "v"))
            yield Linear(f"{at}.out", "row", d, d)
            yield Linear(f"{at}.mlp_in", "column", d, 4 * d)
            yield Linear(f"{at}.mlp_out", "row", 4 * d, d)
    yield Linear("output.mod", "modulation", d, 2 * d)
    yield Linear("output.proj", "replicated", d, model.in_channels)


@dataclass(frozen=True)
class Weights:
    """The weights of a model: all of them train, or adapters alone."""

    model: MMDiTConfig
    lora: LoRAConfig | None = None
    quantize: Literal["none", "nf4", "int8", "fp8"] = "none"
    swapped: int = 0
    """Blocks in host memory, two of which visit the device at a time."""

    @property
    def linears(self) -> dict[str, Linear]:
        return linears(self.model)

    @cached_property
    def unread(self) -> set[str]:
        """Layers that no forward pass runs: the last block's text stream after attention."""
        return {f"blocks.{self.model.num_layers - 1}.txt.{name}" for name in AFTER_ATTENTION}

    @cached_property
    def adapted(self) -> set[str]:
        """Layers with an adapter."""
        targets = () if self.lora is None else self.lora.targets
        return {n for n in self.linears if any(f".{n}".endswith(f".{t}") for t in targets)} - self.unread

    @cached_property
    def first_adapted(self) -> int:
        """The first block behind which activations have gradients; -1 if they have from the start."""
        if self.lora is None or self.adapted & {"img_in", "txt_in", "time.linear_1", "time.linear_2"}:
            return -1
        blocks = [int(n.split(".")[1]) for n in self.adapted if n.startswith("blocks.")]
        return min(blocks, default=self.model.num_layers)

    def trains(self, name: str) -> bool:
        """Whether a layer, or its adapter, has gradients."""
        return name in self.adapted if self.lora is not None else name not in self.unread

    def number(self, tp: int = 1) -> float:
        """Weights that a rank of `tp` holds, adapters included."""
        return self._base(tp) + self._adapters(tp)

    def trained(self, tp: int = 1) -> float:
        """Those of them that train."""
        if self.lora is not None:
            return self._adapters(tp)
        return self._base(tp) - sum(held(self.model, tp)[n] for n in self.unread)

    def stored_bytes(self, tp: int, size: int) -> float:
        """Bytes of a rank's weights, `size` each where they are not quantised."""
        each = QUANTIZED_BYTES[self.quantize]
        if each is None:
            return size * self.number(tp)
        scales = 0 if self.quantize == "nf4" else 4
        blocks = [layer for name, layer in self.linears.items() if name.startswith("blocks.")]
        weights = sum(x.inputs * x.outputs for x in blocks) / tp
        channels = sum(x.outputs / (1 if x.kind == "row" else tp) for x in blocks)
        away = max(0, self.swapped - 2) / self.model.num_layers
        return size * (self.number(tp) - weights) + (1 - away) * (each * weights + scales * channels)

    def _base(self, tp: int) -> float:
        norms = (
            self.model.joint_attention_dim + self.model.num_layers * len(STREAMS) * 2 * self.model.attention_head_dim
        )
        return norms + sum(held(self.model, tp).values())

    def _adapters(self, tp: int) -> float:
        return sum(self.linears[n].adapter(self.lora.rank, tp) for n in self.adapted)
