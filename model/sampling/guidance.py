"""True classifier-free guidance over a pack of pictures; everything in token space.

Shape legend: S pictures, L target tokens of all pictures (one after another), C channels of a token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.moving import moved
from model.packing import ModelInputs, Pack, SampleShape, Size, patchify, token_size


@dataclass(frozen=True)
class Condition:
    """What one picture is drawn from."""

    txt: Tensor
    """[length, D] hidden states of the prompt."""
    txt_empty: Tensor | None = None
    """[length, D] hidden states of the negative prompt, with the same pictures in it; needed for guidance."""
    references: tuple[Tensor, ...] = ()
    """Latents [C, 1, h, w] of the pictures to edit."""

    def to(self, device: torch.device | str) -> "Condition":
        return moved(self, device)


class Guidance:
    """A fixed batch of conditions and sizes, laid out once: positives and, if `cfg_scale` > 1, negatives in one pack.

    The true CFG of Qwen-Image: neg + scale (pos - neg), rescaled per token to the norm of pos. Raises ValueError for a
    negative prompt that is missing.
    """

    def __init__(
        self,
        conditions: list[Condition],
        sizes: list[Size],
        cfg_scale: float = 4.0,
        align: int = 16,
        first_like: Sequence[int] | None = None,
    ):
        """`sizes` in tokens (frames, height, width). The pack lives where the conditions live.

        `first_like` names for each picture the first that is equal to it, noise level and condition included: the
        model is then asked about these alone. Default: each its own.
        """
        if len(conditions) != len(sizes):
            raise ValueError(f"{len(conditions)} conditions, but {len(sizes)} sizes")
        self.lengths = [math.prod(size) for size in sizes]
        self._asked, self._answer = list(range(len(sizes))), None
        if first_like is not None:
            self._asked = sorted(set(first_like))
            self._answer = [self._asked.index(i) for i in first_like]
            conditions, sizes = [conditions[i] for i in self._asked], [sizes[i] for i in self._asked]
        texts = [c.txt for c in conditions]
        self.cfg_scale, self.guided = cfg_scale, cfg_scale > 1
        if self.guided:
            if any(c.txt_empty is None for c in conditions):
                raise ValueError("guidance needs the negative prompt of every picture; encode ' ' if there is none")
            texts += [c.txt_empty for c in conditions]
            conditions, sizes = conditions * 2, sizes * 2
        shapes = [
            SampleShape(len(txt), size, tuple(map(token_size, c.references)))
            for txt, size, c in zip(texts, sizes, conditions, strict=True)
        ]
        self.pack = Pack.of(shapes, align).to(texts[0].device)
        references = [patchify(r) for c in conditions for r in c.references]
        self._txt = _fill(texts, len(self.pack.txt_pos))
        self._references = references

    def inputs(self, x: Tensor, sigma: Tensor) -> ModelInputs:
        """Inputs of the model for the pictures' tokens x [L, C] at noise levels sigma [S] (on the CPU)."""
        if self._answer is not None:
            pieces, sigma = self.split(x), sigma[self._asked]
            x = torch.cat([pieces[i] for i in self._asked])
        levels, row = torch.unique(sigma.cpu(), return_inverse=True)
        copies = 2 if self.guided else 1
        img = _fill([x] * copies + self._references, len(self.pack.img_pos))
        return ModelInputs(img, self._txt, moved(levels, x.device), self.pack, sigma_row=tuple(row.tolist()) * copies)

    def combine(self, output: Tensor) -> Tensor:
        """Guided velocity [L, C] from the model's output on `inputs`; differentiable through both branches."""
        if self.guided:
            pos, neg = output.chunk(2)
            both = neg + self.cfg_scale * (pos - neg)
            norm = both.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(both.dtype).tiny)
            output = both * (pos.norm(dim=-1, keepdim=True) / norm)
        if self._answer is None:
            return output
        pieces = output.split([self.lengths[i] for i in self._asked])
        return torch.cat([pieces[i] for i in self._answer])

    def per_token(self, values: Tensor) -> Tensor:
        """[S] -> [L, 1]: the value of each token's picture."""
        lengths = moved(torch.tensor(self.lengths), values.device)
        return values.repeat_interleave(lengths, output_size=sum(self.lengths))[:, None]

    def split(self, x: Tensor) -> list[Tensor]:
        """[L, ...] -> one piece a picture."""
        return list(x.split(self.lengths))


def _fill(parts: list[Tensor], length: int) -> Tensor:
    tail = length - sum(map(len, parts))
    return torch.cat([*parts, parts[0].new_zeros(tail, parts[0].shape[1])])
