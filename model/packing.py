"""Packing: samples of any shape in one batch, without a padded sample.

A batch is two token streams. The *text stream* holds the prompts one after another. The *image stream* holds first
the target tokens of every sample, then the reference tokens of every sample, so that everything computed for
targets only is a prefix. Both end in one alignment tail, which forms an attention segment of its own and never
reaches a loss. The joint order, in which attention runs, is sample by sample: [text, target, references].

Shape legend: S samples, Lt / Li tokens of the text / image stream with their tails, C channels of a token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from model.moving import moved
from model.rope import sample_positions

PADDED_TO = 32
"""Tokens in whose multiples the lengths of samples are alike enough to be padded to one."""
EVEN_TO, EVEN_COST = 4, 1.3
"""Evened texts have a multiple of so many tokens; a pack is not evened if that makes more than this of its tokens."""

Size = tuple[int, int, int]
"""(frames, height, width) in tokens."""


@dataclass(frozen=True)
class SampleShape:
    """What one sample contributes to a pack: text tokens, the target's size, the references' sizes."""

    txt: int
    target: Size
    references: tuple[Size, ...] = ()

    @property
    def joint(self) -> int:
        """Tokens of the sample in joint attention."""
        return self.txt + math.prod(self.target) + sum(map(math.prod, self.references))


@dataclass(frozen=True)
class Even:
    """A pack's samples as one batch: each has `text` tokens, padding included, and `image` tokens."""

    samples: int
    text: int
    image: int
    bias: Tensor
    """[samples, 1, 1, text + image], added to attention's logits: -inf where a key is padding."""


@dataclass(frozen=True)
class Pack:
    """Where each token of a batch belongs. Build it with `Pack.of`; `to` moves its tensors."""

    shapes: tuple[SampleShape, ...]
    txt_pos: Tensor
    """[Lt, 3] MSRoPE positions."""
    img_pos: Tensor
    """[Li, 3]"""
    joint_order: Tensor
    """[Lt + Li] joint order -> index into cat(text stream, image stream)."""
    cu_seqlens: Tensor
    """int32 [segments + 1] boundaries of the attention segments in joint order, the tail last if there is one."""
    even: "Even | None" = None
    """Set if all samples take equally many tokens of each stream."""

    @classmethod
    def of(cls, shapes: list[SampleShape], align: int = 16) -> "Pack":
        """Lay out `shapes`, both streams rounded up to a multiple of `align` tokens.

        `align` must be a multiple of the number of token shards (lcm(TP * CP, 16) on a cluster; a larger quantum
        bounds how many shapes a compiled model sees). Raises ValueError for an empty batch or an empty prompt.
        """
        if not shapes:
            raise ValueError("a batch needs at least one sample")
        if any(s.txt < 1 for s in shapes):
            raise ValueError("every sample needs at least one text token; encode the empty prompt as ' '")
        txt_len, target_len = [s.txt for s in shapes], [math.prod(s.target) for s in shapes]
        ref_len = [sum(map(math.prod, s.references)) for s in shapes]
        n_txt, n_target, n_ref = sum(txt_len), sum(target_len), sum(ref_len)
        pad_txt, pad_img = -n_txt % align, -(n_target + n_ref) % align

        txt_pos, img_pos = _positions(shapes, "msrope", n_txt + pad_txt, n_target + n_ref + pad_img)
        txt_at = torch.arange(n_txt).split(txt_len)
        target_at = (n_txt + pad_txt + torch.arange(n_target)).split(target_len)
        ref_at = (n_txt + pad_txt + n_target + torch.arange(n_ref)).split(ref_len)
        order = [t for sample in zip(txt_at, target_at, ref_at, strict=True) for t in sample]
        tail = [n_txt + torch.arange(pad_txt), n_txt + pad_txt + n_target + n_ref + torch.arange(pad_img)]
        lengths = [s.joint for s in shapes] + ([pad_txt + pad_img] if pad_txt + pad_img else [])
        return cls(
            shapes=tuple(shapes),
            txt_pos=txt_pos,
            img_pos=img_pos,
            joint_order=torch.cat(order + tail),
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        )

    @cached_property
    def evened(self) -> "tuple[Pack, Tensor] | None":
        """The same pack with all texts padded to one length, and where in its text stream each text token goes [Lt].

        Both streams are then regular, [samples, tokens], so that nothing needs to be looked up and compiled code meets
        few shapes. Padding joins the tail. None for one sample, different pictures, or texts too different.
        """
        image = math.prod(self.shapes[0].target)
        if len(self.shapes) == 1 or any(s.references or s.target != self.shapes[0].target for s in self.shapes):
            return None
        text = -(-max(s.txt for s in self.shapes) // EVEN_TO) * EVEN_TO
        count, lengths = len(self.shapes), [s.txt for s in self.shapes]
        if count * (text + image) > EVEN_COST * sum(s.joint for s in self.shapes):
            return None
        real = (torch.arange(text) < torch.tensor(lengths)[:, None]).flatten()
        places, padding = real.nonzero().flatten(), (~real).nonzero().flatten()
        own = places.split(lengths)
        pictures = (count * text + torch.arange(count * image)).split(image)
        order = [t for sample in zip(own, pictures, strict=True) for t in sample]
        seen = F.pad(real.unflatten(0, (count, text)), (0, image), value=True)[:, None, None]
        bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
        device, segments = self.txt_pos.device, [s.joint for s in self.shapes] + [len(padding)] * bool(len(padding))
        pack = Pack(
            shapes=self.shapes,
            txt_pos=self.txt_pos.new_zeros(count * text, 3).index_copy_(0, places, self.txt_pos[: len(places)]),
            img_pos=self.img_pos[: count * image],
            joint_order=torch.cat([*order, padding]).to(device),
            cu_seqlens=torch.tensor([0, *segments]).cumsum(0).int().to(device),
            even=Even(count, text, image, bias.to(device)),
        )
        return pack, places.to(device)

    @property
    def n_samples(self) -> int:
        return len(self.shapes)

    @cached_property
    def text_lengths(self) -> list[int]:
        """Tokens of each sample in the text stream, padding included."""
        return [s.txt if self.even is None else self.even.text for s in self.shapes]

    @cached_property
    def target_lengths(self) -> list[int]:
        """Target tokens of each sample; targets are the first sum(target_lengths) tokens of the image stream."""
        return [math.prod(s.target) for s in self.shapes]

    @cached_property
    def reference_lengths(self) -> list[int]:
        """Reference tokens of each sample; references follow the targets."""
        return [sum(map(math.prod, s.references)) for s in self.shapes]

    @cached_property
    def n_target(self) -> int:
        return sum(self.target_lengths)

    @cached_property
    def segment_lengths(self) -> list[int]:
        """Lengths of the attention segments in joint order, the tail's included."""
        tail = len(self.joint_order) - sum(s.joint for s in self.shapes)
        return [s.joint for s in self.shapes] + ([tail] if tail else [])

    @cached_property
    def in_joint_order(self) -> bool:
        """Whether the streams, one after the other, are in joint order already: one sample without a text tail."""
        return len(self.shapes) == 1 and self.shapes[0].txt == len(self.txt_pos)

    @cached_property
    def inverse_order(self) -> Tensor:
        """[Lt + Li] index into cat(text stream, image stream) -> joint order."""
        return torch.argsort(self.joint_order)

    @cached_property
    def padded(self) -> tuple[list[tuple[int, int, Tensor]], Tensor]:
        """The samples in groups of about one length: (samples, length, bias of their keys) of each group, and slots.

        A group's samples are padded to its longest; the bias [samples, 1, 1, length] is -inf at padding. `slots`
        [Lt + Li] is where each token of cat(text stream, image stream) lies in the groups, one after the other; tails
        lie behind them.
        """
        lengths = [s.joint for s in self.shapes]
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        alike: dict[int, list[int]] = {}
        for sample, length in enumerate(lengths):
            alike.setdefault(-(-length // PADDED_TO), []).append(sample)
        groups, end, slots = [], 0, torch.empty(len(self.joint_order), dtype=torch.long)
        for _, samples in sorted(alike.items()):
            longest = max(lengths[s] for s in samples)
            bias = torch.zeros(len(samples), 1, 1, longest)
            for row, s in enumerate(samples):
                slots[starts[s] : starts[s + 1]] = torch.arange(end, end + lengths[s])
                bias[row, ..., lengths[s] :] = -torch.inf
                end += longest
            groups.append((len(samples), longest, bias))
        slots[starts[-1] :] = torch.arange(end, end + len(slots) - starts[-1])
        return groups, torch.empty_like(slots).index_copy_(0, self.joint_order, slots)

    def rank_major(self, cp: int) -> tuple[Tensor, Tensor]:
        """(joint order, its inverse) when the streams arrive as [text_0, image_0, text_1, image_1, ...] of cp ranks.

        That is the order in which Ulysses' all-to-all delivers tokens. Both streams must divide by cp.
        """
        if cp == 1:
            return self.joint_order, self.inverse_order
        n_txt, n_img = len(self.txt_pos), len(self.img_pos)
        if n_txt % cp or n_img % cp:
            raise ValueError(f"streams of {n_txt} and {n_img} tokens do not divide over {cp} context-parallel ranks")
        a, b = n_txt // cp, n_img // cp
        at = self.joint_order
        img = at - n_txt
        moved = torch.where(
            at < n_txt, at // a * (a + b) + at % a, img.div(b, rounding_mode="floor") * (a + b) + a + img % b
        )
        return moved, torch.argsort(moved)

    def positions(self, scheme: str) -> tuple[Tensor, Tensor]:
        """Positions of the text and the image stream by a scheme of `model/rope.py`."""
        if scheme == "msrope":
            return self.txt_pos, self.img_pos
        text, image = _positions(self.shapes, scheme, len(self.txt_pos), len(self.img_pos))
        return text.to(self.txt_pos.device), image.to(self.img_pos.device)

    def split_targets(self, x: Tensor) -> list[Tensor]:
        """Cut a tensor over target tokens [n_target, ...] (a longer one is cut first) into one piece a sample."""
        return list(x[: self.n_target].split(self.target_lengths))

    def to(self, device: torch.device | str) -> "Pack":
        return moved(self, device)


def _positions(shapes: Sequence[SampleShape], scheme: str, n_txt: int, n_img: int) -> tuple[Tensor, Tensor]:
    """Positions of both streams, zero in their tails."""
    samples = [sample_positions(s.txt, [s.target, *s.references], scheme) for s in shapes]
    targets, references = [images[0] for _, images in samples], [r for _, images in samples for r in images[1:]]
    text, image = torch.cat([text for text, _ in samples]), torch.cat(targets + references)
    return F.pad(text, (0, 0, 0, n_txt - len(text))), F.pad(image, (0, 0, 0, n_img - len(image)))


@dataclass(frozen=True)
class ModelInputs:
    """One forward pass of the MMDiT."""

    img: Tensor
    """[Li, C] image tokens: noised targets, clean references, tail."""
    txt: Tensor
    """[Lt, joint_attention_dim] hidden states of the text encoder, tail."""
    sigma: Tensor
    """[S] noise level of each sample in [0, 1]; 1 is pure noise."""
    pack: Pack
    sigma_row: tuple[int, ...] | None = None
    """The row of `sigma` that each sample has (default: its own), so that samples at one noise level share a row."""

    def evened(self) -> "ModelInputs":
        """The same inputs in the even form of their pack, if it has one."""
        if self.pack.evened is None:
            return self
        pack, places = self.pack.evened
        txt = self.txt.new_zeros(len(pack.txt_pos), self.txt.shape[1])
        return replace(
            self,
            img=self.img[: len(pack.img_pos)],
            txt=txt.index_copy(0, places, self.txt[: len(places)]),
            pack=pack,
        )

    def to(self, device: torch.device | str) -> "ModelInputs":
        return moved(self, device)


def patchify(latent: Tensor, patch: int = 2) -> Tensor:
    """Latent [C, F, H, W] -> tokens [F * H/p * W/p, C * p * p], channels ordered (c, dy, dx) as in the reference."""
    c, f, h, w = latent.shape
    if h % patch or w % patch:
        raise ValueError(
            f"a latent of {h} x {w} does not divide into patches of {patch}; pictures need multiples of 16"
        )
    x = latent.reshape(c, f, h // patch, patch, w // patch, patch)
    return x.permute(1, 2, 4, 0, 3, 5).reshape(f * (h // patch) * (w // patch), c * patch * patch)


def unpatchify(tokens: Tensor, size: Size, patch: int = 2) -> Tensor:
    """Inverse of `patchify` for a target of `size` (frames, height, width) tokens: [F*h*w, C*p*p] -> [C, F, H, W]."""
    f, h, w = size
    x = tokens.reshape(f, h, w, -1, patch, patch)
    return x.permute(3, 0, 1, 4, 2, 5).reshape(-1, f, h * patch, w * patch)


def token_size(latent: Tensor, patch: int = 2) -> Size:
    """Size in tokens of a latent [C, F, H, W]."""
    _, f, h, w = latent.shape
    return f, h // patch, w // patch


def pack_inputs(
    targets: list[Tensor],
    texts: list[Tensor],
    sigma: Tensor,
    references: list[list[Tensor]] | None = None,
    align: int = 16,
    pack: Pack | None = None,
) -> ModelInputs:
    """Pack a batch: latents [C, F, H, W] at noise level sigma [S], prompts [length, dim], clean reference latents.

    All on one device; the tails are zeros. `pack` reuses the layout of an earlier call with the same shapes, as a
    sampler does at each step. Raises ValueError if the lists' lengths differ.
    """
    references = references or [[] for _ in targets]
    if not len(targets) == len(texts) == len(references) == len(sigma):
        raise ValueError(
            f"{len(targets)} targets, {len(texts)} prompts, {len(references)} reference lists, {len(sigma)} sigmas"
        )
    if pack is None:
        shapes = [
            SampleShape(len(t), token_size(x), tuple(map(token_size, refs)))
            for x, t, refs in zip(targets, texts, references, strict=True)
        ]
        pack = Pack.of(shapes, align).to(targets[0].device)
    img = torch.cat([patchify(x) for x in targets] + [patchify(r) for refs in references for r in refs])
    txt = torch.cat(texts)
    fill = lambda x, n: torch.cat([x, x.new_zeros(n - len(x), x.shape[1])]) if n > len(x) else x  # noqa: E731
    return ModelInputs(fill(img, len(pack.img_pos)), fill(txt, len(pack.txt_pos)), sigma, pack)
