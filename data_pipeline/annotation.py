"""What a vision-language model says of a picture: one question, one JSON object, checked before it is used.

As in the Qwen-Image report (section 3.3) captions and attributes come from one pass. A sample belongs to one of three
splits: raw (its own caption trains), recaptioned (the model's does), fused (the model's, which was shown the raw one).
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from command_line import UserError
from data_pipeline.parallel import map_threads
from data_pipeline.pictures import decode
from data_pipeline.sample import RawSample
from data_pipeline.shards import OnProblem, Problem
from data_pipeline.stages import SYNTHETIC

Ask = Callable[[str, list[np.ndarray]], str]
"""The model's answer to a question about pictures uint8 [h, w, 3]; UserError if there is none."""

AREA = 1024 * 1024
"""Pixels that larger pictures are reduced to before they are shown."""
UNANSWERED = 8
"""After so many questions in a row without an answer the model is taken to be gone."""


@dataclass(frozen=True)
class Field:
    """One entry of the JSON object."""

    name: str
    asks: str
    """What the model is told about it."""
    choices: tuple[str, ...] = ()
    most: int = 0
    """Characters that it may have; 0 for a list of at most 20 short texts."""

    def read(self, value: Any) -> Any:
        """The checked value; ValueError says what is wrong with it."""
        if not self.most:
            if not isinstance(value, list) or len(value) > 20 or not all(isinstance(v, str) for v in value):
                raise ValueError(f'"{self.name}" must be a list of at most 20 texts')
            return [v.strip()[:200] for v in value if v.strip()]
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f'"{self.name}" must be a text')
        value = value.strip()
        if len(value) > self.most:
            raise ValueError(f'"{self.name}" has {len(value)} characters, more than {self.most}')
        if self.choices and (value := value.lower()) not in self.choices:
            raise ValueError(f'"{self.name}" must be one of {", ".join(self.choices)}')
        return value


TYPES = ("photograph", "painting", "illustration", "3d render", "design", "screenshot", "document", "chart", "other")
DOMAINS = ("nature", "people", "design")
FIELDS = (
    Field(
        "caption",
        "a complete description in two to six sentences: subjects, their attributes, actions and relations, the "
        "background, light and composition; every text in the picture word for word, in quotation marks",
        most=4000,
    ),
    Field("caption_short", "the same in one sentence of at most 25 words", most=400),
    Field("type", "the kind of picture", TYPES, most=40),
    Field("style", "its style in a few words, for instance: documentary, watercolour, flat vector", most=200),
    Field(
        "domain",
        "nature (objects, landscape, cities, plants, animals, food, interiors), people (portraits, sports, activities) "
        "or design (posters, interfaces, slides, paintings, crafts, digital art)",
        DOMAINS,
        most=40,
    ),
    Field("category", "a path of two or three words from broad to narrow, for instance: animal/cat/kitten", most=100),
    Field("watermarks", "a list of the watermarks, logos and stamps of owners laid over the picture; [] if none"),
    Field(
        "abnormal_elements",
        "a list of what does not belong: QR codes, bar codes, mosaics or blurred faces, frames, compression damage; "
        "[] if none",
    ),
)

QUESTION = "Look at the picture and answer with one JSON object and nothing else. Its fields:\n" + "\n".join(
    f'"{f.name}": {f.asks}' + (f"; one of {', '.join(f.choices)}" if f.choices else "") for f in FIELDS
)
FUSED = (
    "\n\nThis is what its source says of it: {raw}\nIt may be wrong or say too little. Keep the names and facts in it "
    "that the picture does not contradict."
)
AGAIN = "\n\nYour last answer could not be used: {why}. Answer with the complete JSON object only."


def read_annotation(answer: str) -> dict[str, Any]:
    """The JSON object in an answer (fenced or not), its fields checked; ValueError says what is wrong with it."""
    from data_pipeline.filters.caption import says_nothing

    start = answer.find("{")
    if start < 0:
        raise ValueError("there is no JSON object in it")
    try:
        found, _ = json.JSONDecoder().raw_decode(answer[start:])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its JSON is broken ({error})") from None
    if missing := [f.name for f in FIELDS if f.name not in found]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    annotation = {f.name: f.read(found[f.name]) for f in FIELDS}
    for name in ("caption", "caption_short"):
        if says_nothing(annotation[name]):
            raise ValueError(f'"{name}" says nothing about the picture')
    return annotation


@dataclass(frozen=True)
class Splits:
    """Shares of the splits, and how captions of a model train."""

    raw: float = 1.0
    recaptioned: float = 2.0
    fused: float = 1.0
    short: float = 0.2
    """Share of the recaptioned and fused samples that train on the short caption."""

    def __post_init__(self):
        shares = (self.raw, self.recaptioned, self.fused)
        if not all(0 <= s < math.inf for s in shares) or not sum(shares) or not 0 <= self.short <= 1:
            raise ValueError("splits take shares from 0 on, not all 0, and short a share from 0 to 1")

    def of(self, key: str) -> tuple[str, bool]:
        """(split, whether the short caption trains) of a sample, a function of its key."""
        u, v = (
            int.from_bytes(hashlib.blake2b(f"{what}/{key}".encode(), digest_size=7).digest(), "big") / 2**56
            for what in ("split", "short")
        )
        u *= self.raw + self.recaptioned + self.fused
        split = "raw" if u < self.raw else "recaptioned" if u < self.raw + self.recaptioned else "fused"
        return split, split != "raw" and v < self.short


@dataclass(frozen=True)
class Failure:
    """Why a sample stays as it was."""

    what: str
    answered: bool = True


@dataclass(frozen=True)
class Annotator:
    """Asks a model about samples."""

    ask: Ask
    splits: Splits
    attempts: int = 3
    """Answers that are asked for until one is valid."""

    def annotate(self, sample: RawSample) -> RawSample | Failure:
        """The sample with what the model says of it in its record."""
        split, short = self.splits.of(sample.key)
        raw = sample.meta.get("captions", {}).get("raw", sample.meta["caption"])
        question = QUESTION + (FUSED.format(raw=json.dumps(raw, ensure_ascii=False)) if split == "fused" else "")
        why = ""
        try:
            image = _reduced(sample.image)
            for _ in range(self.attempts):
                try:
                    found = read_annotation(self.ask(question + (AGAIN.format(why=why) if why else ""), [image]))
                except ValueError as error:
                    why = str(error)
                else:
                    return replace(sample, meta=sample.meta | _record(found, raw, split, short))
        except ValueError as error:
            return Failure(f"its picture {error}")
        except UserError as error:
            return Failure(str(error), answered=False)
        return Failure(f"no valid annotation in {self.attempts} answers: {why}")

    def annotate_all(
        self, samples: Iterable[RawSample], threads: int, shard: str, on_problem: OnProblem
    ) -> Iterator[RawSample]:
        """All samples in order; those that cannot be annotated go to `on_problem` and stay as they were.

        Pictures drawn with their caption and results of edits are not asked about. UserError when the model stops
        answering: after `UNANSWERED` questions in a row, or if nothing in the shard was answered.
        """
        silent = answered = 0
        why = ""
        for sample, result in map_threads(self._annotate_if_needed, samples, threads, ahead=2 * threads):
            if isinstance(result, Failure):
                on_problem(Problem(shard, sample.key, result.what))
            if isinstance(result, Failure) and not result.answered:
                silent, why = silent + 1, result.what
                if silent == UNANSWERED:
                    break
            elif result is not sample:
                silent, answered = 0, answered + 1
            yield sample if isinstance(result, Failure) else result
        if silent == UNANSWERED or (silent and not answered):
            raise UserError(f"the last {silent} questions were not answered: {why}")

    def _annotate_if_needed(self, sample: RawSample) -> RawSample | Failure:
        exact = sample.references or sample.meta.get("source") in SYNTHETIC
        return sample if exact else self.annotate(sample)


def _record(found: dict[str, Any], raw: str, split: str, short: bool) -> dict[str, Any]:
    captions = {"raw": raw, "long": found["caption"], "short": found["caption_short"]}
    return {
        "caption": captions["raw" if split == "raw" else "short" if short else "long"],
        "captions": captions,
        "caption_split": split,
        "domain": found["domain"],
        "category": found["category"],
        "annotation": {name: found[name] for name in ("type", "style", "watermarks", "abnormal_elements")},
    }


def _reduced(data: bytes) -> np.ndarray:
    image = decode(data)
    scale = (AREA / (image.width * image.height)) ** 0.5
    if scale < 1:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    return np.asarray(image)
