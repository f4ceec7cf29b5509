"""The contract between an algorithm and the engine: what a training step minimises, apart from how it is run.

An algorithm turns samples into model inputs and outputs into losses; the engine runs microbatches, reduces gradients,
clips and steps. The gradient of a step is sum(loss sums) / sum(weights) over all microbatches and ranks: a sample
weighs 1 whatever its size and wherever it was placed. Imports no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from training.kinds import Kinds
    from training.randomness import Randomness

Model = Callable[[Any], Any]
"""inputs -> output: an MMDiT's velocity [n_target, C], say."""
Frozen = Mapping[str, Model]
"""Frozen policies by name, run without gradient; "ema" is the moving average of the policy."""
Metrics = dict[str, "Tensor"]
"""Sums over the batch's weight, or a value for each sample [n], which the engine sums; it divides by the total weight.
"loss" for each sample is logged by kind of sample, too (`training.kinds`)."""


@dataclass(frozen=True)
class Fixed:
    """A frozen copy of the weights that the run started from; a resumed run reads them from there again."""


@dataclass(frozen=True)
class WithoutAdapters:
    """The base of a model with adapters: needs no copy."""


@dataclass(frozen=True)
class Following:
    """A copy that moves towards the policy: copy <- d copy + (1 - d) policy; checkpoints hold it."""

    decay: Callable[[int], float]
    """d after n updates of the policy before this one."""
    every: int = 1
    """Updates of the policy from one move to the next."""


FrozenPolicy = Fixed | WithoutAdapters | Following
"""How a frozen policy is kept. One whose answers are known beforehand needs none: they come with `prepare`."""


@dataclass(frozen=True)
class Prepared:
    """A microbatch that `Algorithm.prepare` is done with."""

    inputs: Any
    aux: Any
    keys: tuple[str, ...] = ()
    """Of its samples, where they have some."""
    kinds: "Kinds | None" = None
    """Of its samples, where there are some."""


class Algorithm(Protocol):
    """Two pure functions, and the frozen policies that the second one calls."""

    frozen: Mapping[str, FrozenPolicy]

    def prepare(self, batch: list[Any], rng: "Randomness", align: int) -> tuple[Any, Any]:
        """(model inputs, whatever else `loss` needs) of one microbatch, on the CPU; the engine moves both.

        Touches no model, so that it can run ahead in another thread. `align` is what packs must be a multiple of.
        """

    def loss(self, model: Model, frozen: Frozen, inputs: Any, aux: Any) -> "tuple[Tensor, float, Metrics]":
        """(sum of per-sample losses, weight, metrics). May call the model and the frozen policies several times."""


class Batches(Protocol):
    """Yields this data-parallel rank's microbatches of a step; its cursor is JSON.

    All ranks end together. An algorithm that makes its batches with the model being trained holds the engine itself.
    One that reads ahead may have an attribute `prepare`: the loop sets it to what is to be done with each microbatch,
    a function that gives a `Prepared`, where there is something to be gained. One that several steps train on may have
    an attribute `resumable`, false where its cursor could not be gone on from: a signal then waits for a later step.
    """

    def __next__(self) -> "list[list[Any] | Prepared]": ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
