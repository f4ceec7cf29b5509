"""Randomness of training as a function of (seed, epoch, sample key, purpose, draw index), and of nothing else.

Rank, pack, microbatch and step never enter, so every parallel layout and every resumed run sees the same noise,
timesteps and dropout. Draws are made on the CPU in fp32 by Philox, a counter-based generator with a 128-bit key.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Randomness:
    """Keyed source of random numbers. The same arguments always give the same numbers."""

    seed: int

    def _generator(self, key: str, epoch: int, purpose: str, draw: int) -> np.random.Generator:
        name = f"{self.seed}/{epoch}/{purpose}/{draw}/{key}"
        digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

    def normal(self, key: str, epoch: int, purpose: str, shape: tuple[int, ...] = (), draw: int = 0) -> Tensor:
        """Standard normal fp32 of `shape`."""
        values = self._generator(key, epoch, purpose, draw).standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(np.asarray(values, dtype=np.float32))

    def uniform(self, key: str, epoch: int, purpose: str, shape: tuple[int, ...] = (), draw: int = 0) -> Tensor:
        """Uniform fp32 in [0, 1) of `shape`."""
        values = self._generator(key, epoch, purpose, draw).random(shape, dtype=np.float32)
        return torch.from_numpy(np.asarray(values, dtype=np.float32))
