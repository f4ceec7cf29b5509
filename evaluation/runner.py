"""Draw and score a suite's pictures: spread over processes, restartable, cached.

Prompts are worked on in fixed batches, each by one process, and a batch is done when its rows are on disk. So the
pictures don't depend on how many processes there are or on interruptions; a second run reads what the first wrote.

    CACHE/SUITE-HASH/         PROMPT-INDEX.png: what was drawn       (hash of model, its code, prompts and sampling)
    CACHE/SUITE-HASH/HASH/    batch-00012.json: scores of a batch    (hash of the judge and of this code)
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.prompts import Prompt
from evaluation.suites import Suite, generator, prompts_fingerprint
from files import atomic_file, hash_files, write_json
from model.generator import Generator

if TYPE_CHECKING:
    from evaluation.picture_measures import PictureMeasures

ROOT = Path(__file__).resolve().parent.parent
PICTURES_PER_BATCH = 16
CONTROLS = ("ceiling", "blank", "other", "constant")
"""Beside the model's pictures: VAE round trips of true ones, blank ones, true ones of other prompts, and the one
picture that gets the most of a measure if it is drawn whatever is asked."""


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn."""

    height: int
    width: int
    steps: int
    cfg_scale: float
    images_per_prompt: int
    seed: int

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) in pixels."""
        return self.height, self.width


@dataclass(frozen=True)
class Row:
    """Scores of one picture."""

    prompt: str
    stratum: str
    kind: str
    """"model", one of CONTROLS, or "constant MEASURE"."""
    index: int
    """Number of the picture among its prompt's."""
    scores: dict[str, float]


class Source:
    """A model that may have to be loaded: `load()` is called when the first picture is to be drawn."""

    def __init__(self, name: str, fingerprint: str, load: Callable[[], Generator]):
        self.name, self.fingerprint, self._load = name, fingerprint, load
        self._maker: Generator | None = None

    @property
    def maker(self) -> Generator:
        """The loaded model."""
        if self._maker is None:
            self._maker = self._load()
        return self._maker


def picture_seed(prompt: Prompt, sampling: Sampling, index: int) -> int:
    """Seed of a prompt's picture, the same for every model."""
    digest = hashlib.blake2b(f"{sampling.seed}/{index}/{prompt.id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


class SuiteRun:
    """One suite on one source."""

    def __init__(
        self,
        source: Source,
        suite: Suite,
        prompts: list[Prompt],
        sampling: Sampling,
        cache: Path,
        measures: "PictureMeasures | None" = None,
    ):
        self.source, self.suite, self.prompts, self.sampling = source, suite, prompts, sampling
        self.measures = measures
        code = hash_files(p for package in ("model", "vae") for p in (ROOT / package).rglob("*.py"))
        drawn = [source.fingerprint, code, suite.name, prompts_fingerprint(prompts), asdict(sampling)]
        self.pictures = cache / f"{suite.name.replace('/', '-')}-{_hash(drawn)}"
        judging = hash_files([*(ROOT / "evaluation").glob("*.py"), *(ROOT / "rewards").glob("*.py")])
        judges = [suite.fingerprint, judging, None if measures is None else measures.fingerprint]
        self.rows = self.pictures / _hash(judges)

    def batches(self) -> list[list[Prompt]]:
        """Prompts that are drawn together: at least two, at most PICTURES_PER_BATCH pictures if that allows."""
        size = max(2, PICTURES_PER_BATCH // self.sampling.images_per_prompt)
        return [self.prompts[i : i + size] for i in range(0, len(self.prompts), size)]

    def picture_file(self, prompt: Prompt, index: int) -> Path:
        """Where a picture of the model is kept."""
        return self.pictures / f"{prompt.id.replace('/', '-')}-{index}.png"

    def work(self, rank: int, world_size: int, advance: Callable[[int], None]) -> None:
        """Do this process's share of what is missing; `advance` is told of every prompt that is done."""
        self.rows.mkdir(parents=True, exist_ok=True)
        for i, batch in enumerate(self.batches()):
            if i % world_size == rank:
                if not self._rows_file(i).exists():
                    write_json(self._rows_file(i), [asdict(row) for row in self._do(batch)])
                advance(len(batch))

    def drawn(self) -> Iterator[np.ndarray]:
        """Every picture of the model; the work must be done."""
        for prompt in self.prompts:
            for j in range(self.sampling.images_per_prompt):
                yield read_picture(self.picture_file(prompt, j))

    def read(self) -> list[Row]:
        """All rows, in the order of the prompts; the work must be done."""
        return [Row(**row) for i in range(len(self.batches())) for row in json.loads(self._rows_file(i).read_text())]

    def _rows_file(self, i: int) -> Path:
        return self.rows / f"batch-{i:05d}.json"

    def _do(self, batch: list[Prompt]) -> Iterator[Row]:
        images = self._draw(batch)
        for kind, pictures in [("model", images), *self._controls(batch, images)]:
            items = [(p, j, x) for p, group in zip(batch, pictures, strict=True) for j, x in enumerate(group)]
            if not items:
                continue
            shown, asked = [x for _, _, x in items], [p for p, _, _ in items]
            scores = self.suite.score(shown, asked)
            if kind.startswith("constant"):
                scores = {name: values for name, values in scores.items() if kind == f"constant {name}"}
            elif self.measures is not None:
                scores |= self.measures.score(shown, asked)
            if kind == "model" and self.sampling.images_per_prompt > 1:
                scores["diversity"] = [diversity(pictures[batch.index(p)]) for p, _, _ in items]
            for i, (prompt, j, _) in enumerate(items):
                yield Row(prompt.id, prompt.stratum, kind, j, {name: float(v[i]) for name, v in scores.items()})

    def _draw(self, batch: list[Prompt]) -> list[list[np.ndarray]]:
        """The model's pictures of each prompt, from the cache if all are there."""
        wanted = [(p, j) for p in batch for j in range(self.sampling.images_per_prompt)]
        if not all(self.picture_file(p, j).exists() for p, j in wanted):
            sources = {p.id: _to_images(self.suite.sources(p, self.sampling.size)) for p in batch}
            drawn = self.source.maker.generate(
                [p.text for p, _ in wanted],
                [self.sampling.size] * len(wanted),
                [picture_seed(p, self.sampling, j) for p, j in wanted],
                [sources[p.id] for p, _ in wanted],
            )
            for (prompt, j), image in zip(wanted, drawn, strict=True):
                write_picture(self.picture_file(prompt, j), image)
        n = self.sampling.images_per_prompt
        images = [read_picture(self.picture_file(p, j)) for p, j in wanted]
        return [images[i : i + n] for i in range(0, len(images), n)]

    def _controls(
        self, batch: list[Prompt], images: list[list[np.ndarray]]
    ) -> Iterator[tuple[str, list[list[np.ndarray]]]]:
        size = self.sampling.size
        truths = [self.suite.truth(p, size) for p in batch]
        needed = any(t is not None for t in truths)  # else what draws is not loaded
        reconstruct = getattr(self.source.maker, "reconstruct", None) if needed else None
        yield "ceiling", [[] if t is None or reconstruct is None else [reconstruct(t)] for t in truths]
        yield "blank", [[np.full((*size, 3), generator(p, "blank").integers(0, 256, 3), np.uint8)] for p in batch]
        others = [self.suite.other(p, size) for p in batch]
        rotated = images[1:] + images[:1]
        alone = len(batch) == 1
        yield "other", [[o] if o is not None else [] if alone else [r[0]] for o, r in zip(others, rotated, strict=True)]
        for measure, picture in self.suite.constants(size).items():
            yield f"constant {measure}", [[picture]] * len(batch)


def diversity(pictures: list[np.ndarray]) -> float:
    """Mean distance of a prompt's pictures from each other: RMS difference of 32 x 32 thumbnails, 0 to 1."""
    import cv2

    small = [cv2.resize(p, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float64) / 255 for p in pictures]
    pairs = [(a, b) for i, a in enumerate(small) for b in small[:i]]
    return float(np.mean([np.sqrt(((a - b) ** 2).mean()) for a, b in pairs]))


def write_picture(path: Path, image: np.ndarray) -> None:
    """Save losslessly, whole or not at all."""
    from PIL import Image

    with atomic_file(path) as file:
        Image.fromarray(image).save(file, "PNG", compress_level=3)


def read_picture(path: Path) -> np.ndarray:
    """uint8 [h, w, 3]."""
    from PIL import Image

    return np.array(Image.open(path).convert("RGB"))


def _to_images(pictures: list[np.ndarray]) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(p) for p in pictures]


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
