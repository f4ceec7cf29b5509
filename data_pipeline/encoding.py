"""Raw samples to encoded samples, one shard at a time: pictures to latents, captions to hidden states.

A shard's batches are formed from its own samples alone, so its bytes are a function of its input, however often the
work was interrupted. Each picture is decoded once, in threads that run ahead of the networks.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data_pipeline.atomic import atomic_file, write_json
from data_pipeline.pictures import decode, fit
from data_pipeline.sample import EncodedSample, Fingerprint, RawSample
from data_pipeline.shards import OnProblem, Problem, read_raw, write_encoded

if TYPE_CHECKING:
    from model.conditioner import Conditioner
    from vae.autoencoder import VAE

EMPTY_PROMPT = " "


@dataclass(frozen=True)
class Fitted:
    """A raw sample whose picture was cut and resized to its bucket."""

    raw: RawSample
    pixels: np.ndarray
    """uint8 [h, w, 3]"""
    meta: dict


@dataclass(frozen=True)
class Encoder:
    """The networks and the resolution that turn raw samples into encoded ones."""

    conditioner: "Conditioner"
    vae: "VAE"
    res: int
    batch_size: int = 16
    decode_threads: int = 2

    def fingerprint(self) -> Fingerprint:
        """What the results depend on."""
        return Fingerprint(self.vae.fingerprint(), *self.conditioner.fingerprint(), resolution=self.res)

    def write_description(self, out: Path) -> None:
        """Write `dataset.json` and `empty.safetensors`, which make `out` an encoded data set."""
        from safetensors.torch import save

        (empty,) = self.conditioner.encode([EMPTY_PROMPT])
        with atomic_file(out / "empty.safetensors") as file:
            file.write(save({"txt": empty.bfloat16().cpu().contiguous()}))
        write_json(out / "dataset.json", {"fingerprint": asdict(self.fingerprint())})

    def encode_shard(self, source: Path, target: Path, on_problem: OnProblem, on_samples: Callable[[int], None]) -> int:
        """Write `target` from `source`; returns the number of samples in it.

        What cannot be read or decoded goes to `on_problem` and is left out; `on_samples` is told of progress.
        """
        fitted = self._fitted(read_raw(source, on_problem), source.name, on_problem)
        return write_encoded(target, self._encoded(fitted, on_samples))

    def _fitted(self, samples: Iterable[RawSample], shard: str, on_problem: OnProblem) -> Iterator[Fitted]:
        """Decode and fit in threads, at most two batches ahead, in order."""
        with ThreadPoolExecutor(self.decode_threads) as pool:
            for raw, result in _in_order(pool, self._fit, samples, ahead=2 * self.batch_size):
                if isinstance(result, ValueError):
                    on_problem(Problem(shard, raw.key, str(result)))
                else:
                    yield result

    def _fit(self, raw: RawSample) -> "Fitted | ValueError":
        try:
            pixels, box = fit(decode(raw.image), self.res)
        except ValueError as error:
            return error
        height, width, _ = pixels.shape
        return Fitted(raw, pixels, raw.meta | {"bucket": [width, height], "crop": [round(x, 2) for x in box]})

    def _encoded(self, samples: Iterable[Fitted], on_samples: Callable[[int], None]) -> Iterator[EncodedSample]:
        """Encode bucket by bucket: whenever one has a full batch, and in the end what is left in each."""
        waiting: dict[tuple[int, ...], list[Fitted]] = defaultdict(list)
        for sample in samples:
            batch = waiting[sample.pixels.shape]
            batch.append(sample)
            if len(batch) == self.batch_size:
                yield from self._encode(batch)
                on_samples(len(batch))
                batch.clear()
        for batch in filter(None, waiting.values()):
            yield from self._encode(batch)
            on_samples(len(batch))

    def _encode(self, batch: list[Fitted]) -> Iterator[EncodedSample]:
        latents = self.vae.encode_latent(self._pixels(batch)).float().cpu()
        texts = self.conditioner.encode([s.raw.meta["caption"].strip() or EMPTY_PROMPT for s in batch])
        for sample, latent, txt in zip(batch, latents, texts, strict=True):
            yield EncodedSample(sample.raw.key, latent, txt.bfloat16().cpu(), meta=sample.meta)

    def _pixels(self, batch: list[Fitted]) -> Tensor:
        """[B, 3, 1, h, w] in [-1, 1] where the VAE is."""
        pixels = torch.from_numpy(np.stack([s.pixels for s in batch])).permute(0, 3, 1, 2)[:, :, None]
        return pixels.to(next(self.vae.parameters()).device).float() / 127.5 - 1


def _in_order(pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator[tuple]:
    """(item, function(item)) in the items' order, at most `ahead` of them begun and not yet taken."""
    begun: deque[tuple] = deque()
    for item in items:
        begun.append((item, pool.submit(function, item)))
        if len(begun) == ahead:
            first, result = begun.popleft()
            yield first, result.result()
    while begun:
        first, result = begun.popleft()
        yield first, result.result()
