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
            if self._side is not None:
                for part in layer.stored():
                    part.data = part.pin_memory()
        room = lambda: [[torch.empty_like(p, device=device) for p in m.stored()] for m in self._layers[0]]  # noqa: E731
        self._rooms = [room() for _ in range(min(2, count))]
        self._held: list[int | None] = [None] * len(self._rooms)
        self._arrived: list[torch.cuda.Event | None] = [None] * len(self._rooms)
        self._present = -1

    def fetched(self, layer: QuantizedLinear) -> list[Tensor]:
        """What `layer` stores, on the device; valid until a third block is asked for."""
        block = self._block[layer]
        if block != self._present:
            self._turn_to(block)
        room = self._held.index(block)
        return self._rooms[room][self._layers[block].index(layer)]

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
            for at, layer in enumerate(self._layers[block]):
                for part, stored in zip(self._rooms[room][at], layer.stored(), strict=True):
                    part.copy_(stored, non_blocking=True)
            if self._side is not None:
                self._arrived[room] = self._side.record_event()
        self._held[room] = block
