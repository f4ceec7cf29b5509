"""Whole matrices out of slices: each is put together on one rank, worked at there, and its slices go back.

Megatron's distributed optimizer leaves to data-parallel rank d (context parallel included) a range of the flattened
tensor that tensor-parallel rank t holds, itself a slice of the matrix along one dimension. An element travels to one
rank and back, where gathering would send it to all of them.
"""

from collections.abc import Callable, Iterable
from itertools import accumulate, groupby, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import spread
from model.ops import full_shape
from training.engine.device import Layout
from training.engine.shards import Shards

AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""Elements of matrices of one shape that are worked at together, at most; on a CPU what its cache holds."""


class Exchange:
    """Who works at which of the matrices called `names`, and where their slices lie; alike on all ranks.

    `cost(o, i)` is that of a matrix [o, i]; every rank gets about the same sum of it.
    """

    def __init__(self, shards: Shards, layout: Layout, names: Iterable[str], cost: Callable[[int, int], int]):
        self._params = {name: shards.ddp.module.get_parameter(name) for name in names}
        shapes = {name: tuple(full_shape(param)) for name, param in self._params.items()}
        self.shapes = dict(sorted(shapes.items(), key=lambda item: item[1]))
        """Of the whole matrices, equal ones side by side."""
        self._world, self._tp, self._spans = layout.world_size, layout.tp_size, shards.spans()
        ordered, costs = list(self.shapes), [cost(*shape) for shape in self.shapes.values()]
        owned = [[ordered[i] for i in mine] for mine in spread(costs, self._world)]
        self.mine = owned[layout.rank]
        """The matrices that this rank works at."""
        there = [(owner, name) for owner, theirs in enumerate(owned) for name in theirs]
        sizes = [self._length(layout.rank, name) for _, name in there]
        self.slices = {name: span for (_, name), span in zip(there, _ranges(sizes), strict=True)}
        """Where this rank's slice of each matrix lies in what it sends, and in what it gets back."""
        self.size = sum(sizes)
        self._sent = [sum(self._length(layout.rank, name) for name in theirs) for theirs in owned]
        here = [(rank, name) for rank in range(self._world) for name in self.mine]
        self._pieces = dict(zip(here, _ranges([self._length(*piece) for piece in here]), strict=True))
        self._received = [sum(self._length(rank, name) for name in self.mine) for rank in range(self._world)]

    def applied(self, sent: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """What `function` makes of the matrices, of each shape together [n, o, i], in the place of their slices.

        Overwrites `sent`, this rank's slices one behind another. Collective.
        """
        here = self._travelled(sent, self._sent, self._received)
        for shape, alike in groupby(self.mine, key=self.shapes.__getitem__):
            names, count = list(alike), max(1, AT_ONCE[sent.device.type] // (shape[0] * shape[1]))
            for some in (names[at : at + count] for at in range(0, len(names), count)):
                if self._world == 1:
                    whole = here[self.slices[some[0]].start : self.slices[some[-1]].stop].view(-1, *shape)
                    whole.copy_(function(whole))
                else:
                    self._put(here, some, function(torch.stack([self._whole(here, name) for name in some])))
        return self._travelled(here, self._received, self._sent)

    def _travelled(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        if self._world == 1:
            return x
        there = x.new_empty(sum(received))
        dist.all_to_all_single(there, x, received, sent)
        return there

    def _whole(self, here: Tensor, name: str) -> Tensor:
        """A matrix [o, i] from all ranks' slices."""
        param, (dim, _, size) = self._params[name], self._shard(name)
        ranks = range(0, self._world, self._tp)
        held = [torch.cat([here[self._pieces[d + t, name]] for d in ranks]).view(param.shape) for t in range(size)]
        return torch.cat(held, dim)

    def _put(self, here: Tensor, names: list[str], matrices: Tensor) -> None:
        """Write matrices over the slices that they were put together from."""
        for name, whole in zip(names, matrices, strict=True):
            dim, _, size = self._shard(name)
            held = [part.flatten() for part in whole.chunk(size, dim)]
            for rank in range(self._world):
                d, t = divmod(rank, self._tp)
                here[self._pieces[rank, name]] = held[t % size][slice(*self._spans[name][d])]

    def _shard(self, name: str) -> tuple[int, int, int]:
        return getattr(self._params[name], "tp_shard", (0, 0, 1))

    def _length(self, rank: int, name: str) -> int:
        start, end = self._spans[name][rank // self._tp]  # Megatron counts tensor-parallel ranks first
        return end - start


def _ranges(sizes: list[int]) -> list[slice]:
    """Neighbouring slices of these sizes."""
    return [slice(start, end) for start, end in pairwise(accumulate(sizes, initial=0))]
