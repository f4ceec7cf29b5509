"""How healthy a step was, by group of parameters and kind of sample: on the device until it is read with all else.

Losses of kinds are summed over ranks in an order that all know; a kind that one of them meets for the first time is
made known to all once the step has been read.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from training.engine.clipping import by_group
from training.engine.device import Layout
from training.engine.shards import Shards
from training.kinds import SOURCE, Kinds

GROUPS = ("image", "text", "modulation", "embeddings", "output")
"""Groups of parameters: of the blocks the image stream, the text stream and their modulation, then what is before and
behind the blocks."""
UPDATE_EVERY = 10
"""Steps from one measurement of the update to the next."""
SOURCES = 32
"""Sources whose losses are told apart at most: those that come first."""


def group_of(name: str) -> str:
    """The group of a parameter."""
    if name.startswith("output."):
        return "output"
    if ".mod." in name:
        return "modulation"
    return "image" if ".img." in name else "text" if ".txt." in name else "embeddings"


class Health:
    """Norms of gradients and updates by group, and losses by kind, of one step after another."""

    def __init__(self, layout: Layout, optimizer: DistributedOptimizer, shards: Shards):
        self._layout, self._optimizer, self._shards = layout, optimizer, shards
        self._params: list[Tensor] = []
        self._member: Tensor | None = None
        self._update: Tensor | None = None
        """[2 groups] squared norms of an update and of the weights after it, until they are read, a step later."""
        self._kinds: list[str] = []
        """What all ranks know of."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._reduced: Tensor | None = None

    # Losses by kind

    def begin(self) -> None:
        """Begin a step."""
        self._sums, self._counts = {}, {}

    def add(self, kinds: Kinds, losses: Tensor) -> None:
        """Count the losses [n] of a microbatch."""
        for name, count, total in zip(kinds.names, kinds.counts, kinds.sums(losses), strict=True):
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + count

    def losses(self) -> Tensor:
        """Sums and counts of the kinds that are known, and whether there are news here: fp64, to be summed over
        data-parallel ranks and given back to `reduced`."""
        host = [*(self._counts.get(name, 0) for name in self._kinds), bool(self._news())]
        zero = torch.zeros((), dtype=torch.float64, device=self._layout.device)
        sums = [self._sums.get(name, zero) for name in self._kinds]
        return torch.stack([*sums, *(torch.full_like(zero, float(value)) for value in host)])

    def reduced(self, losses: Tensor) -> None:
        """Take the sums over ranks of what `losses` gave."""
        self._reduced = losses

    # Norms by group

    def member(self) -> Tensor:
        """bool [groups, gradients] of the gradients that a norm counts on this rank; after `prepare_grads`."""
        if self._member is None:
            names = {id(param): name for name, param in self._shards.masters().items()}
            owner = {id(param.grad): param for param in self._optimizer.get_parameters()}
            grads = self._optimizer.get_main_grads_for_grad_norm()
            self._params = [owner[id(grad)] for grad in grads]
            groups = [group_of(names[id(param)]) for param in self._params]
            member = torch.tensor([[own == group for own in groups] for group in GROUPS], dtype=torch.bool)
            self._member = member.to(self._layout.device)
        return self._member

    def before_update(self, step: int) -> list[Tensor] | None:
        """Copies of the weights that the step's update is measured by; None in a step whose update is not."""
        if step % UPDATE_EVERY:
            return None
        return [param.detach().clone() for param in self._params]

    @torch.no_grad()
    def after_update(self, before: list[Tensor] | None) -> None:
        """Measure the update; collective."""
        if before is None:
            return
        squares = torch.zeros(2, len(GROUPS), device=self._layout.device)
        if before:
            torch._foreach_sub_(before, self._params)
            norms = torch.stack(torch._foreach_norm([*before, *self._params])).float().square()
            squares = torch.stack([by_group(self._member, part) for part in norms.chunk(2)])
        dist.all_reduce(squares, group=self._optimizer.get_grad_stats_parallel_group())
        self._update = squares.flatten()

    # What is read

    def values(self) -> Tensor:
        """What is to be read and given to `read`, fp64."""
        update = [] if self._update is None else [self._update.double()]
        return torch.cat([self._reduced, *update])

    def read(self, values: list[float], squared_norms: list[float]) -> dict[str, float]:
        """Metrics of the step: of `values`, and the squared norms of the gradient of each group.

        Collective in a step in which a kind is new: then the device is asked once more.
        """
        kinds, (is_new, *update) = values[: 2 * len(self._kinds)], values[2 * len(self._kinds) :]
        if is_new:
            kinds = self._learn()
        sums, counts = kinds[: len(self._kinds)], kinds[len(self._kinds) :]
        found = {f"loss/{n}": s / c for n, s, c in zip(self._kinds, sums, counts, strict=True) if c}
        found |= {f"grad_norm/{g}": s**0.5 for g, s in zip(GROUPS, squared_norms, strict=True) if s}
        if update:
            changes, weights = update[: len(GROUPS)], update[len(GROUPS) :]
            found |= {f"update/{g}": (u / w) ** 0.5 for g, u, w in zip(GROUPS, changes, weights, strict=True) if w}
            self._update = None
        return found

    def _room(self) -> int:
        """Sources that may still become known."""
        return SOURCES - sum(name.startswith(SOURCE) for name in self._kinds)

    def _news(self) -> set[str]:
        """Kinds of this step that are to be made known."""
        room = self._room()
        return {name for name in self._sums.keys() - set(self._kinds) if room or not name.startswith(SOURCE)}

    def _learn(self) -> list[float]:
        """Make the news of this step known to all ranks; sums and counts of all kinds."""
        found: list[Any] = [None] * self._layout.world_size
        dist.all_gather_object(found, self._news(), group=self._layout.host_group)
        news = set().union(*found)
        too_many = sorted(name for name in news if name.startswith(SOURCE))[self._room() :]
        self._kinds = sorted({*self._kinds, *news}.difference(too_many))
        losses = self.losses()
        dist.all_reduce(losses, group=self._layout.dp_group)
        *values, _ = losses.tolist()
        return values

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """What a resumed run takes to log the same, for JSON."""
        return {"kinds": self._kinds, "update": None if self._update is None else self._update.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._kinds, update = list(state["kinds"]), state["update"]
        self._update = None if update is None else torch.tensor(update, device=self._layout.device)
