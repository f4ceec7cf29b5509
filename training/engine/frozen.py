"""Frozen policies: other weights of the model being trained, run through the same module without gradient."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from training.algorithm import Fixed, Following, FrozenPolicy, Model, WithoutAdapters
from training.ema import MovingAverage
from training.engine.shards import Shards

EMA = "ema"


class FrozenPolicies(Mapping[str, Model]):
    """Frozen policies by name; "ema" is always among them.

    Looking up one that follows is collective where its weights are sharded: all ranks ask together.
    """

    def __init__(
        self,
        model: nn.Module,
        shards: Shards,
        dtype: torch.dtype,
        ema_decay: Callable[[int], float],
        on_host: bool = False,
    ):
        """`on_host` keeps the copies that follow in the host's memory."""
        self._model, self._shards, self._dtype = model, shards, dtype
        self._average_device = torch.device("cpu") if on_host else None
        self.averages = {EMA: MovingAverage(shards.masters(), ema_decay, device=self._average_device)}
        """The copies that follow, this rank's slices in fp32."""
        self._policies: dict[str, FrozenPolicy] = {EMA: Following(ema_decay)}
        self._weights: dict[str, dict[str, Tensor]] = {}
        self._caching = [m for m in model.modules() if "is_first_microbatch" in vars(m)]

    @torch.no_grad()
    def keep(self, name: str, policy: FrozenPolicy) -> None:
        """Keep a frozen policy from now on; one that is a copy is of the present weights."""
        self._policies[name] = policy
        if isinstance(policy, Following):
            self.averages[name] = MovingAverage(
                self._shards.masters(), policy.decay, policy.every, self._average_device
            )
        self._weights.pop(name, None)
        if isinstance(policy, Fixed):
            self._weights[name] = {n: p.detach().clone() for n, p in self._model.named_parameters() if p.requires_grad}

    def __getitem__(self, name: str) -> Model:
        if name not in self._policies:
            raise KeyError(f"there is no frozen policy {name!r}; the algorithm keeps {', '.join(self._policies)}")
        if name not in self._weights:
            self._weights[name] = self._gather(name)
        return lambda inputs: self._run(name, inputs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._policies)

    def __len__(self) -> int:
        return len(self._policies)

    def policy_changed(self) -> None:
        """Say that the weights were updated: averages follow."""
        for name, average in self.averages.items():
            average.update()
            self._weights.pop(name, None)

    def start_over(self) -> None:
        """Say that the weights were set from outside: averages start from them."""
        for name, average in self.averages.items():
            average.reset()
            self._weights.pop(name, None)

    def release(self) -> None:
        """Let go of the whole copies of what is kept in slices; they are gathered again when asked for."""
        for name in self.averages:
            self._weights.pop(name, None)

    @torch.no_grad()
    def _gather(self, name: str) -> dict[str, Tensor]:
        if isinstance(self._policies[name], WithoutAdapters):
            adapters = [(n, p) for n, p in self._model.named_parameters() if n.endswith(".lora.b.weight")]
            return {n: torch.zeros_like(p) for n, p in adapters}
        device = next(self._model.parameters()).device
        return {n: w.to(device, self._dtype) for n, w in self._shards.gather(self.averages[name].average)}

    def first_microbatch(self) -> None:
        """Say that the model's weights differ from those of its last forward pass: layers that keep what they made of
        them (Transformer Engine's, in fp8) make it anew."""
        for layer in self._caching:
            layer.is_first_microbatch = True

    @torch.no_grad()
    def _run(self, name: str, inputs: Any) -> Any:
        self.first_microbatch()
        output = functional_call(self._model, self._weights[name], (inputs,))
        self.first_microbatch()
        return output
