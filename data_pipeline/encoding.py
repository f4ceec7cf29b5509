"""Raw samples to encoded samples, one shard at a time: pictures to latents, captions to hidden states.

The result of an edit also gets the latent of each picture that the edit began with, encoded alone, and its instruction
is encoded together with those pictures.

A shard's batches are formed from its own samples alone, so its bytes are a function of its input, however often the
work was interrupted. Each picture is decoded once, in threads that run ahead of the networks.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data_pipeline.filters.tools import Tools
from data_pipeline.filters.view import View
from data_pipeline.parallel import map_threads
from data_pipeline.pictures import decode, fit
from data_pipeline.sample import EncodedSample, Fingerprint, RawSample
from data_pipeline.shards import OnProblem, Problem, read_raw, require_sound, write_encoded
from files import atomic_file, write_json

if TYPE_CHECKING:
    from PIL.Image import Image

    from data_pipeline.filters.judge import InlineFilters
    from model.conditioner import Conditioner
    from vae.autoencoder import VAE

EMPTY_PROMPT = " "
OnBroken = Callable[[str, Exception], None]
"""Is told a sample's key and what is wrong with it."""
ENCODING_VERSION = 1
"""Grows whenever a change of the code gives other latents or hidden states of the same picture and caption, beyond
rounding; `tests/data_pipeline/test_encoding_version.py` asks at each change."""


@dataclass(frozen=True)
class Fitted:
    """A raw sample whose picture was cut and resized to its bucket."""

    raw: RawSample
    pixels: np.ndarray
    """uint8 [h, w, 3]"""
    meta: dict
    references: tuple[np.ndarray, ...] = ()
    """uint8 [h, w, 3] each, in its own bucket."""
    shown: "tuple[Image, ...]" = ()
    """The references for the text encoder, at its resolution."""


@dataclass(frozen=True)
class Encoder:
    """The networks and the resolution that turn raw samples into encoded ones."""

    conditioner: "Conditioner"
    vae: "VAE"
    res: int
    batch_size: int = 16
    decode_threads: int = 2
    filters: "InlineFilters | None" = None
    """What drops samples before they are encoded."""

    def fingerprint(self) -> Fingerprint:
        """What the results depend on."""
        return Fingerprint(self.vae.fingerprint(), *self.conditioner.fingerprint(), self.res, ENCODING_VERSION)

    def write_empty_prompt(self, out: Path) -> None:
        """Write `empty.safetensors`: the empty prompt's hidden states."""
        from safetensors.torch import save

        (empty,) = self.conditioner.encode([EMPTY_PROMPT])
        with atomic_file(out / "empty.safetensors") as file:
            file.write(save({"txt": empty.bfloat16().cpu().contiguous()}))

    def write_description(self, out: Path) -> None:
        """Write `empty.safetensors` and then `dataset.json`, which makes `out`, now whole, an encoded data set."""
        self.write_empty_prompt(out)
        write_json(out / "dataset.json", {"fingerprint": asdict(self.fingerprint())})

    def encode_shard(
        self,
        source: Path,
        target: Path,
        on_problem: OnProblem,
        on_samples: Callable[[int], None],
        on_dropped: Callable[[str], None] = lambda rule: None,
    ) -> int:
        """Write `target` from `source`; returns the number of samples in it.

        What cannot be read or decoded goes to `on_problem` and is left out; `on_dropped` is told the filter of each
        sample that one drops, `on_samples` of progress.
        """
        fitted = self._fitted(read_raw(source, on_problem), source.name, on_problem, on_dropped)
        broken = lambda key, error: on_problem(Problem(source.name, key, str(error)))  # noqa: E731
        return write_encoded(target, _sound(self._encoded(fitted, on_samples, broken), broken))

    def _fitted(
        self, samples: Iterable[RawSample], shard: str, on_problem: OnProblem, on_dropped: Callable[[str], None]
    ) -> Iterator[Fitted]:
        """Decode and fit in threads, at most two batches ahead, in order."""
        for raw, result in map_threads(self._fit, samples, self.decode_threads, ahead=2 * self.batch_size):
            if isinstance(result, ValueError):
                on_problem(Problem(shard, raw.key, str(result)))
            elif isinstance(result, str):
                on_dropped(result)
            else:
                yield result

    def _fit(self, raw: RawSample) -> "Fitted | ValueError | str":
        """The sample ready for the networks, or what is wrong with it, or the filter that drops it."""
        view, meta = View(raw, self.filters.tools if self.filters else Tools()), raw.meta
        try:
            if self.filters:
                verdict = self.filters(view)
                if verdict.dropped_by:
                    return verdict.dropped_by
                meta = verdict.noted(meta)
            self.conditioner.require(raw.meta["caption"], len(raw.references))
            pixels, box = fit(view.image, self.res)
            references, shown = self._fit_references(raw)
        except ValueError as error:
            return error
        except (MemoryError, OSError):
            raise  # no sample's fault
        except Exception as error:  # noqa: BLE001 - a filter, of ours or not, met a picture that it did not expect
            return ValueError(f"{type(error).__name__}: {error}")
        height, width, _ = pixels.shape
        meta = meta | {"bucket": [width, height], "crop": [round(x, 2) for x in box]}
        return Fitted(raw, pixels, meta, references, shown)

    def _fit_references(self, raw: RawSample) -> "tuple[tuple[np.ndarray, ...], tuple[Image, ...]]":
        """Each reference in its bucket for the VAE, and the same part of it for the text encoder."""
        from PIL.Image import Resampling

        from model.conditioner import REFERENCE_SIDE_PX, fit_area

        fitted, shown = [], []
        for i, data in enumerate(raw.references):
            try:
                picture = decode(data)
            except ValueError as error:
                raise ValueError(f"its reference {i} {error}") from None
            pixels, box = fit(picture, min(self.res, REFERENCE_SIDE_PX))
            size = fit_area(box[2] - box[0], box[3] - box[1], self.conditioner.picture_area)
            fitted.append(pixels)
            shown.append(picture.resize(size, Resampling.LANCZOS, box=box))
        return tuple(fitted), tuple(shown)

    def _encoded(
        self, samples: Iterable[Fitted], on_samples: Callable[[int], None], broken: OnBroken
    ) -> Iterator[EncodedSample]:
        """Encode bucket by bucket: whenever one has a full batch, and in the end what is left in each."""
        waiting: dict[tuple[int, ...], list[Fitted]] = defaultdict(list)
        for sample in samples:
            batch = waiting[sample.pixels.shape]
            batch.append(sample)
            if len(batch) == self.batch_size:
                yield from self._encode_sound(batch, broken)
                on_samples(len(batch))
                batch.clear()
        for batch in filter(None, waiting.values()):
            yield from self._encode_sound(batch, broken)
            on_samples(len(batch))

    def _encode_sound(self, batch: list[Fitted], broken: OnBroken) -> list[EncodedSample]:
        """Encode a batch, or where the networks fail on it each sample alone, and leave out those that they fail on.

        If they fail on a grey picture, too, it is they that are broken, and their error is raised.
        """
        try:
            return list(self._encode(batch))
        except Exception as error:  # noqa: BLE001 - networks are the user's
            if len(batch) == 1:
                grey = RawSample("", b"", "png", {"caption": EMPTY_PROMPT})
                list(self._encode([Fitted(grey, np.full_like(batch[0].pixels, 128), {})]))
                broken(batch[0].raw.key, error)
                return []
        return [sample for one in batch for sample in self._encode_sound([one], broken)]

    def _encode(self, batch: list[Fitted]) -> Iterator[EncodedSample]:
        latents = self._latents([s.pixels for s in batch])
        texts = self._texts([s.raw.meta["caption"].strip() or EMPTY_PROMPT for s in batch], batch)
        edits = [s for s in batch if s.references]
        empty = iter(self._texts([EMPTY_PROMPT] * len(edits), edits))
        for sample, latent, txt in zip(batch, latents, texts, strict=True):
            references = [self._latents([pixels])[0] for pixels in sample.references]
            txt_empty = next(empty) if references else None
            yield EncodedSample(sample.raw.key, latent, txt, references, txt_empty, sample.meta)

    def _texts(self, prompts: list[str], batch: list[Fitted]) -> list[Tensor]:
        """bf16 [L_i, D] of each prompt, with its sample's references."""
        hidden = self.conditioner.encode(prompts, [list(s.shown) for s in batch])
        return [h.bfloat16().cpu() for h in hidden]

    def _latents(self, pictures: list[np.ndarray]) -> Tensor:
        """fp32 [B, 16, 1, h/8, w/8] of uint8 pictures [h, w, 3] of one size."""
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)[:, :, None]
        pixels = pixels.to(next(self.vae.parameters()).device).float().div_(127.5).sub_(1)
        return self.vae.encode_latent(pixels).float().cpu()


def _sound(samples: Iterable[EncodedSample], broken: OnBroken) -> Iterator[EncodedSample]:
    for sample in samples:
        try:
            require_sound(sample)
        except ValueError as error:
            broken(sample.key, error)
        else:
            yield sample
