"""Frozen linear layers whose weights are stored in four or eight bits, for adapters to train beside (QLoRA, arXiv
2305.14314).

nf4 is bitsandbytes' four-bit NormalFloat in blocks of 64 whose scales are quantised again; int8 and fp8 (e4m3) are
torchao's, with one scale an output channel. A weight is multiplied out when it is used, and again in the backward pass,
so that neither memory nor the graph holds more than one layer of it. Only the large layers of the blocks are stored so;
all else, and the adapters, are layers of the compute dtype.
"""

import logging
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib import import_module
from math import ceil
from types import ModuleType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.config import LoRAConfig, MMDiTConfig
from model.lora import add_adapters
from model.mmdit import MMDiT
from model.ops import Ops
from training.engine.device import Layout
from training.engine.ops import MegatronOps

Storage = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""What a layer keeps in place of its weight [out, in]: name -> (shape, dtype); the first is called `weight`."""


class Format(Protocol):
    """A way to store a weight [out, in]."""

    library: ModuleType
    """Whose it is; ValueError if it is not installed."""

    def storage(self, out_features: int, in_features: int) -> Storage: ...

    def quantise(self, weight: Tensor) -> list[Tensor]:
        """An fp32 weight -> its parts, in the order of `storage`."""

    def dequantise(self, parts: list[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor: ...

    def linear(self, x: Tensor, parts: list[Tensor], shape: tuple[int, int], bias: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        return F.linear(x, self.dequantise(parts, shape, x.dtype), bias)


class NF4(Format):
    """bitsandbytes: 4 bits a weight, 8 a block of 64, 32 a block of 256 of those."""

    BLOCK, SCALES = 64, 256

    def __init__(self):
        self._codes: dict[torch.device, Tensor] = {}

    @cached_property
    def library(self) -> ModuleType:
        return _library("bitsandbytes")

    def storage(self, out_features: int, in_features: int) -> Storage:
        n = out_features * in_features
        blocks = ceil(n / self.BLOCK)
        return {
            "weight": ((ceil(n / 2), 1), torch.uint8),
            "absmax": ((blocks,), torch.uint8),
            "absmax_scale": ((ceil(blocks / self.SCALES),), torch.float32),
            "absmax_mean": ((), torch.float32),
        }

    def quantise(self, weight: Tensor) -> list[Tensor]:
        packed, state = self.library.functional.quantize_4bit(
            weight, blocksize=self.BLOCK, quant_type="nf4", compress_statistics=True
        )
        return [packed, state.absmax, state.state2.absmax, state.offset]

    def dequantise(self, parts: list[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return self.library.functional.dequantize_4bit(parts[0], self._state(parts, shape, dtype))

    def linear(self, x: Tensor, parts: list[Tensor], shape: tuple[int, int], bias: Tensor) -> Tensor:
        return self.library.matmul_4bit(x, parts[0], self._state(parts, shape, x.dtype), bias=bias)

    def _state(self, parts: list[Tensor], shape: tuple[int, int], dtype: torch.dtype):
        state, device = self.library.functional.QuantState, parts[0].device
        if device not in self._codes:
            self._codes[device] = self.library.functional.create_dynamic_map().to(device)
        scales = state(absmax=parts[2], code=self._codes[device], blocksize=self.SCALES, dtype=torch.float32)
        return state(
            absmax=parts[1], shape=torch.Size(shape), blocksize=self.BLOCK, quant_type="nf4", dtype=dtype,
            offset=parts[3], state2=scales,
        )  # fmt: skip


class PerChannel(Format):
    """torchao: 8 bits a weight, 32 an output channel."""

    def __init__(self, tensor: str, dtype: torch.dtype, **settings: float):
        self.tensor, self.dtype, self.settings = tensor, dtype, settings

    @cached_property
    def library(self) -> ModuleType:
        return _library("torchao").quantization

    def storage(self, out_features: int, in_features: int) -> Storage:
        return {"weight": ((out_features, in_features), self.dtype), "scale": ((out_features, 1), torch.float32)}

    def quantise(self, weight: Tensor) -> list[Tensor]:
        stored = self._class.from_hp(weight, granularity=self.library.PerRow(), **self.settings)
        return [stored.qdata, stored.scale]

    def dequantise(self, parts: list[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return self._class(*parts, block_size=[1, shape[1]], dtype=dtype).dequantize()

    @property
    def _class(self) -> type[Tensor]:
        return getattr(self.library, self.tensor)


FORMATS: dict[str, Callable[[], Format]] = {
    "nf4": NF4,
    "int8": lambda: PerChannel("Int8Tensor", torch.int8),
    "fp8": lambda: PerChannel("Float8Tensor", torch.float8_e4m3fn, hp_value_lb=1e-12),  # a channel may be all zeros
}


class QuantizedLinear(nn.Module):
    """A frozen linear layer [..., in] -> [..., out] whose weight is stored in `format`; uninitialised.

    `.to(dtype)` casts its bias alone. Its computing device is the bias's; `swap`, once set, brings what it stores there
    and keeps it elsewhere.
    """

    def __init__(self, format: Format, in_features: int, out_features: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.format, self.in_features, self.out_features, self.swap = format, in_features, out_features, None
        storage = format.storage(out_features, in_features)
        self._stored = tuple(storage)
        for name, (shape, stored_dtype) in storage.items():
            part = torch.empty(shape, dtype=stored_dtype, device=device)
            if name == "weight":
                self.weight = nn.Parameter(part, requires_grad=False)
            else:
                self.register_buffer(name, part)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that is stood for."""
        return self.out_features, self.in_features

    def stored(self) -> list[Tensor]:
        """What stands for the weight, where it is kept."""
        return [getattr(self, name) for name in self._stored]

    @torch.no_grad()
    def load_weight(self, full: Tensor) -> None:
        """Store a weight [out, in] of any floating dtype. ValueError for another shape."""
        if full.shape != self.shape:
            raise ValueError(f"a weight of shape {tuple(full.shape)} does not fill a layer of {self.shape}")
        parts = self.format.quantise(full.to(self.bias.device, torch.float32).contiguous())
        for stored, part in zip(self.stored(), parts, strict=True):
            stored.copy_(part)
        if self.swap is not None:
            self.swap.forget()

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that is stood for, on the computing device."""
        return self.format.dequantise(self._at_hand(), self.shape, dtype)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)

    def _at_hand(self) -> list[Tensor]:
        return self.stored() if self.swap is None else self.swap.fetched(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        stored = {id(part) for part in self.stored()}

        def moved(tensor: Tensor) -> Tensor:
            if id(tensor) not in stored:
                return fn(tensor)
            if self.swap is not None:
                return tensor
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)


class _Product(torch.autograd.Function):
    """x W^T + bias, which keeps the layer for the backward pass and none of its tensors."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.format.linear(x, layer._at_hand(), layer.shape, layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.layer.dequantised(dy.dtype), None


class QuantizedOps(MegatronOps):
    """The engine's layers with those of the blocks stored in four or eight bits, first on `storage`.

    Raises ValueError for tensor parallelism, an unknown kind, or a library that is not installed.
    """

    def __init__(
        self, kind: str, layout: Layout, dtype: torch.dtype, attention: str = "auto", quantum: int = 16,
        storage: torch.device | None = None, seen_by_aten: bool = False,
    ):  # fmt: skip
        if layout.tp_size > 1:
            raise ValueError(f"a base in {kind} has no tensor-parallel form: train with --tp 1, or without --quantize")
        if kind not in FORMATS:
            raise ValueError(f"there is no format {kind!r}; choose {', '.join(FORMATS)}")
        super().__init__(layout, dtype, attention, quantum, seen_by_aten=seen_by_aten)
        self.format, self.storage = FORMATS[kind](), storage or layout.device
        if self.storage.type != "meta":
            self.format.library  # noqa: B018 - so that a missing one is known before anything is read
        self._adapters = MegatronOps(layout, dtype, attention, quantum)

    @property
    def adapters(self) -> Ops:
        return self._adapters

    def column(self, in_features: int, out_features: int) -> nn.Module:
        return QuantizedLinear(self.format, in_features, out_features, self.storage, self.dtype)

    row = column

    def modulation(self, in_features: int, out_features: int) -> nn.Module:
        if out_features != 6 * in_features:  # the output layer's, which has two vectors; a stream's has six
            return super().modulation(in_features, out_features)
        return self.column(in_features, out_features)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """(name, layer) of each layer whose weight is stored in another form."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, QuantizedLinear))


def resident_bytes(
    config: MMDiTConfig, quantize: str = "none", lora: LoRAConfig | None = None, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Bytes of a model's weights as they are stored, statistics and adapters included; allocates none of them."""
    meta = torch.device("meta")
    alone = Layout(meta, 0, 1, 0, 1, 0, 1, 0, 1, False, *[None] * 6)
    ops = MegatronOps(alone, dtype) if quantize == "none" else QuantizedOps(quantize, alone, dtype)
    with meta:
        model = MMDiT(config, ops)
    if lora is not None:
        add_adapters(model, lora)
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def _library(name: str) -> ModuleType:
    logging.getLogger(name).setLevel(logging.ERROR)  # each warns of kernels for other machines
    try:
        return import_module(name)
    except ImportError:
        raise ValueError(f"--quantize needs {name}: pip install -e '.[quant]' -c constraints.txt") from None
