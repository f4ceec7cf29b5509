"""Tensors on their way to a device, without a wait.

A plain copy from pageable memory to a CUDA device waits until the device has done all that it was given before. From
pinned memory it is queued like any other work.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def moved(value: Any, device: torch.device | str) -> Any:
    """Tensors, and dataclasses, tuples, lists and dicts that hold some, on `device`; anything else, and what is there
    already, is returned as it is."""
    device = torch.device(device)
    waits = device.type == "cuda"
    return _each(lambda x: (_pinned(x) if waits else x).to(device, non_blocking=True), value)


def pinned(value: Any) -> Any:
    """The same value with its CPU tensors in pinned memory; needs CUDA."""
    return _each(_pinned, value)


def _pinned(x: Tensor) -> Tensor:
    return x.pin_memory() if x.device.type == "cpu" else x


def _each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        changed = {n: new for n, old in parts.items() if (new := _each(function, old)) is not old}
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, tuple | list | dict):
        old = value.values() if isinstance(value, dict) else value
        new = [_each(function, part) for part in old]
        if all(a is b for a, b in zip(old, new, strict=True)):
            return value
        if isinstance(value, dict):
            return dict(zip(value, new, strict=True))
        return tuple(new) if isinstance(value, tuple) else new
    return value
