"""Block swap: the stored weights of some blocks stay in host memory and visit the device while they are needed.

Two blocks have room on the device: the one that computes and the one that comes next, whose copy runs beside on CUDA.
Passes go through the blocks to and fro, so the pair at either end stays for the way back. What is stored is never
written on the device, so nothing travels home. (musubi-tuner, https://github.com/kohya-ss/musubi-tuner, streams frozen
weights through a ring in the same way.)
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from training.engine.quantized import QuantizedLinear

ALIGNMENT = 256
"""Bytes."""


class Swap:
    """`count` of `blocks`, spread evenly over them, computing on `device` from weights in host memory.

    The device holds at most two of them. Raises ValueError for more blocks than there are, or blocks not quantised.
    """

    def __init__(self, blocks: Sequence[nn.Module], count: int, device: torch.device):
        if not 0 < count <= len(blocks):
            raise ValueError(f"{count} blocks cannot be swapped: the model has {len(blocks)}")
        chosen = [blocks[(2 * i + 1) * len(blocks) // (2 * count)] for i in range(count)]
        self._layers = [[m for m in block.modules() if isinstance(m, QuantizedLinear)] for block in chosen]
        if not all(self._layers):
            raise ValueError("only the blocks of a quantised model can be swapped")
        self._block = {layer: i for i, layers in enumerate(self._layers) for layer in layers}
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        for layer in self._block:
            layer.swap = self
        self._home = [_packed(layers) for layers in self._layers]
        if self._side is not None:
            for memory in self._home:
                _lock(memory)
        self._rooms = [torch.empty_like(self._home[0], device=device) for _ in range(min(2, count))]
        self._parts = [_views(room, self._layers[0]) for room in self._rooms]
        self._held: list[int | None] = [None] * len(self._rooms)
        self._arrived: list[torch.cuda.Event | None] = [None] * len(self._rooms)
        self._present = -1

    def fetched(self, layer: QuantizedLinear) -> list[Tensor]:
        """What `layer` stores, on the device; valid until a third block is asked for."""
        block = self._block[layer]
        if block != self._present:
            self._turn_to(block)
        room = self._held.index(block)
        return self._parts[room][self._layers[block].index(layer)]

    def forget(self) -> None:
        """Say that what is stored was changed: nothing on the device counts any more."""
        self._held, self._present = [None] * len(self._rooms), -1

    def _turn_to(self, block: int) -> None:
        following = block + 1 if block == 0 or block > self._present else block - 1
        if block not in self._held:
            self._fetch(block, room=int(self._held[0] == following))
        room = self._held.index(block)
        if self._side is not None:
            torch.cuda.current_stream().wait_event(self._arrived[room])
        if following < len(self._layers) and following not in self._held:
            self._fetch(following, room=1 - room)
        self._present = block

    def _fetch(self, block: int, room: int) -> None:
        """Copy a block into a room, on CUDA as soon as all that was asked of the device so far is done."""
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream())
        with nullcontext() if self._side is None else torch.cuda.stream(self._side):
            self._rooms[room].copy_(self._home[block], non_blocking=True)
            if self._side is not None:
                self._arrived[room] = self._side.record_event()
        self._held[room] = block


def _packed(layers: Sequence[QuantizedLinear]) -> Tensor:
    """One piece of host memory that the layers' stored parts lie in from now on."""
    memory = torch.empty(sum(_padded(part) for layer in layers for part in layer.stored()), dtype=torch.uint8)
    for layer, places in zip(layers, _views(memory, layers), strict=True):
        for part, place in zip(layer.stored(), places, strict=True):
            place.copy_(part)
            part.data = place
    return memory


def _views(memory: Tensor, layers: Sequence[QuantizedLinear]) -> list[list[Tensor]]:
    """Where in such a piece of memory each part of each layer lies."""
    found, start = [], 0
    for layer in layers:
        found.append([])
        for part in layer.stored():
            found[-1].append(memory[start : start + part.nbytes].view(part.dtype).view(part.shape))
            start += _padded(part)
    return found


def _padded(part: Tensor) -> int:
    return -(-part.nbytes // ALIGNMENT) * ALIGNMENT


def _lock(memory: Tensor) -> None:
    """Pin memory where it lies; what torch allocates as pinned has a power of two of bytes."""
    if status := int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)):
        raise RuntimeError(f"{memory.nbytes >> 20} MiB of host memory cannot be pinned (CUDA's error {status})")
