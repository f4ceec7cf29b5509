"""Studio: where a trainer's pictures are drawn, by the policy or its moving average, shared over the ranks.

The VAE and the text encoder are loaded when first needed, once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.production import has_room
from model.conditioner import Conditioner
from model.sampling.draw import Request, Sampler
from model.sampling.guidance import Condition
from model.text_to_image import PIXELS_PER_LATENT, TextToImage
from vae.autoencoder import VAE

if TYPE_CHECKING:
    from PIL.Image import Image

    from training.engine.step import Engine


REMEMBERED_TEXTS = 4096
"""Prompts whose hidden states are kept."""


class Studio:
    """Draws with the engine's weights and the networks of a components folder."""

    def __init__(self, engine: "Engine", components: Path, tokens_per_pack: int):
        self.engine, self.components, self.tokens_per_pack = engine, components, tokens_per_pack
        self._dtype = torch.bfloat16 if engine.device.type == "cuda" else torch.float32
        self._hidden = lru_cache(REMEMBERED_TEXTS)(self._encode_one)

    @cached_property
    def vae(self) -> VAE:
        """The VAE with the decoder of pictures."""
        return VAE.from_folder(self.components, self.engine.device, self._dtype).eval()

    @cached_property
    def conditioner(self) -> Conditioner:
        """The text encoder, from now on in memory."""
        return Conditioner.from_folder(self.components, self._reads_on(), self._dtype)

    @property
    def has_text_encoder(self) -> bool:
        """Whether the components can encode prompts."""
        return (self.components / "text_encoder").is_dir()

    def encode(self, texts: list[str]) -> list[Tensor]:
        """Hidden states of texts; a text encoder that was not in memory is let go again."""
        kept = "conditioner" in self.__dict__
        self._wake_text_encoder()
        hidden = self.conditioner.encode(texts)
        if not kept:
            self.forget_text_encoder()
        return hidden

    def conditions(self, texts: list[str]) -> list[Condition]:
        """Conditions of prompts with the empty prompt as negative, on the CPU; each is encoded once in a while.

        Meanwhile the text encoder rests in the host's memory: a GPU has its room for the model.
        """
        found = [Condition(self._hidden(text), self._hidden(" ")) for text in texts]
        if "conditioner" in self.__dict__:
            self.conditioner.text_encoder.to("cpu")
        return found

    def forget_text_encoder(self) -> None:
        """Let go of the text encoder; it is loaded again when needed."""
        self.__dict__.pop("conditioner", None)

    def _encode_one(self, text: str) -> Tensor:
        self._wake_text_encoder()
        return self.conditioner.encode([text])[0].cpu()

    def _wake_text_encoder(self) -> None:
        if "conditioner" in self.__dict__ and self.conditioner.text_encoder.device.type == "cpu":
            self.conditioner.text_encoder.to(self._reads_on())

    def _reads_on(self) -> torch.device:
        """Where the text encoder computes: on the CPU if the GPU has no room for it beside what is there."""
        device = self.engine.device
        if device.type == "cpu":
            return device
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return device if has_room(self.components / "text_encoder", free) else torch.device("cpu")

    def sampler(self, sampler: Sampler) -> Sampler:
        """A sampler with this engine's alignment and pack size."""
        return replace(sampler, align=self.engine.align, tokens_per_pack=self.tokens_per_pack)

    def painter(self, sampler: Sampler, weights: str = "policy", conditioner: Any = None) -> TextToImage:
        """Draws by the "policy" or a frozen policy, as it stands now; call it on all ranks together."""
        velocity = self.engine.model if weights == "policy" else self.engine.frozen[weights]
        conditioner = conditioner or self.__dict__.get("conditioner")
        return TextToImage(velocity, conditioner, self.vae, self.engine.device, self.sampler(sampler))

    def shared_pictures(self, requests: Sequence[Request], sampler: Sampler, weights: str) -> list[np.ndarray]:
        """The uint8 picture of every request, on all ranks: data-parallel ranks draw some each."""
        painter = self.painter(sampler, weights)
        shapes = [(r.noise.shape[-2] * PIXELS_PER_LATENT, r.noise.shape[-1] * PIXELS_PER_LATENT, 3) for r in requests]
        return self.share(shapes, lambda mine: painter.pictures([requests[i].to(painter.device) for i in mine]))

    def share(
        self, shapes: list[tuple[int, int, int]], draw: Callable[[list[int]], list[np.ndarray]]
    ) -> list[np.ndarray]:
        """Pictures of known `shapes` of which this rank draws those that `draw` is told; all ranks get all."""
        engine = self.engine
        mine = list(range(engine.dp_rank, len(shapes), engine.dp_size))
        drawn = dict(zip(mine, draw(mine) if mine else [], strict=True))
        if engine.dp_size == 1:
            return [drawn[i] for i in range(len(shapes))]
        sizes = [int(np.prod(shape)) for shape in shapes]
        pixels = torch.zeros(sum(sizes), dtype=torch.uint8, device=engine.device)
        for i, part in enumerate(pixels.split(sizes)):
            if i in drawn:
                part.copy_(torch.from_numpy(drawn[i]).flatten())
        dist.all_reduce(pixels, group=engine.layout.dp_group)
        return [part.cpu().numpy().reshape(shape) for part, shape in zip(pixels.split(sizes), shapes, strict=True)]


@dataclass
class SharedGenerator:
    """A `Generator` of the moving average's pictures whose prompts are known, so that no text encoder stays loaded."""

    studio: Studio
    texts: list[str]
    sampler: Sampler
    weights: str = "ema"
    _hidden: dict[str, Tensor] = field(init=False)

    def __post_init__(self):
        texts = [*dict.fromkeys([*self.texts, " "])]
        self._hidden = {t: h.cpu() for t, h in zip(texts, self.studio.encode(texts), strict=True)}

    def encode(self, prompts: list[str], images: "list[list[Image]] | None" = None) -> list[Tensor]:
        """Hidden states of prompts that were given at the start."""
        return [self._hidden[p] for p in prompts]

    def generate(
        self,
        prompts: list[str],
        sizes_px: list[tuple[int, int]],
        seeds: list[int],
        images: "list[list[Image]] | None" = None,
    ) -> list[np.ndarray]:
        """See `Generator`; on all ranks."""
        painter = self.studio.painter(self.sampler, self.weights, conditioner=self)
        pick = lambda values, mine: [values[i] for i in mine]  # noqa: E731
        return self.studio.share(
            [(*size, 3) for size in sizes_px],
            lambda mine: painter.generate(pick(prompts, mine), pick(sizes_px, mine), pick(seeds, mine)),
        )
