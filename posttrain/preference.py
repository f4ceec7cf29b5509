"""Preferences: pairs of pictures of one prompt, of which one is better.

On disk a folder of pairs is an encoded data set (see `data_pipeline.sample`) whose samples come in twos, KEY-win and
KEY-lose. Pairs are drawn from a model and judged by a reward (`PairDrawing`), or read from pictures that someone judged
(`encode_pair`).
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.dataset import EncodedDataset
from data_pipeline.encoding import Encoder
from data_pipeline.pictures import decode, fit
from data_pipeline.sample import EncodedSample
from data_pipeline.shards import shard_name, write_encoded
from data_pipeline.tar_index import tar_index
from files import write_json
from model.sampling.draw import Request, Sampler
from model.text_to_image import PIXELS_PER_LATENT, to_uint8
from posttrain.rollout.prompts import Prompt
from training.randomness import Randomness
from training.studio import Studio

if TYPE_CHECKING:
    from rewards import Reward
    from training.engine.step import Engine

ITEMS_PER_SHARD = 16
"""Prompts, or judged pairs, whose pairs are made and written together: what an interruption costs."""
SETTINGS = "pairs.json"
_PICTURE = re.compile(r"(?P<key>.+)\.(?P<side>win|lose)\.(png|jpg|jpeg|webp)")


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt, of which one was preferred. Raises ValueError if their sizes differ."""

    key: str
    win: EncodedSample
    lose: EncodedSample
    epoch: int = 0

    def __post_init__(self):
        if self.win.latent.shape != self.lose.latent.shape:
            raise ValueError(
                f"pair {self.key}: latents of {tuple(self.win.latent.shape)} and {tuple(self.lose.latent.shape)}; "
                "both pictures of a pair need one size"
            )


class PairDataset:
    """The first `limit` pairs of a folder, for `data_pipeline.loader.Loader`. ValueError if there are none."""

    def __init__(self, folder: Path, limit: int | None = None):
        self.samples = EncodedDataset(folder)
        index = {self.samples.key(i): i for i in range(len(self.samples))}
        stems = [key.removesuffix("-win") for key in index if key.endswith("-win")]
        self._pairs = [(s, index[f"{s}-win"], index[f"{s}-lose"]) for s in stems if f"{s}-lose" in index][:limit]
        if not self._pairs:
            raise ValueError(f"{folder} holds no pairs (samples KEY-win and KEY-lose)")
        self.tokens = np.array([self.samples.tokens[w] + self.samples.tokens[x] for _, w, x in self._pairs])
        """Tokens of both samples of each pair in joint attention."""

    def key_hashes(self) -> np.ndarray:
        """64 bits of each winner's key, uint64 [pairs]."""
        return self.samples.key_hashes()[[win for _, win, _ in self._pairs]]

    def __len__(self) -> int:
        return len(self._pairs)

    def key(self, index: int) -> str:
        return self._pairs[index][0]

    def __getitem__(self, index: int) -> Pair:
        key, win, lose = self._pairs[index]
        return Pair(key, self.samples[win], self.samples[lose])


def best_and_worst(rewards: Tensor, min_gap: float) -> tuple[int, int] | None:
    """Indices of the highest and the lowest of rewards [k] (the first of equals); None if less than `min_gap` apart."""
    best, worst = int(rewards.argmax()), int(rewards.argmin())
    return (best, worst) if best != worst and rewards[best] - rewards[worst] >= min_gap else None


@dataclass(frozen=True)
class PairDrawing:
    """How pictures are drawn to be compared."""

    studio: Studio
    sampler: Sampler
    reward: "Reward"
    """Pictures to scores; its "reward" decides."""
    size_px: int
    """Side of the square pictures."""
    pictures: int
    """Pictures of each prompt, of which the best and the worst make a pair."""
    min_gap: float
    """Smallest difference of reward that makes a pair."""
    rng: Randomness

    def pairs(self, prompts: list[Prompt]) -> Iterator[EncodedSample]:
        """Winner and loser of each prompt that has them, on the rank that speaks; all pictures are drawn together."""
        painter, side = self.studio.painter(self.sampler), self.size_px // PIXELS_PER_LATENT
        conditions = self.studio.conditions([prompt.text for prompt in prompts])
        requests = [
            Request(condition, self.rng.normal(f"{prompt.key}#{i}", 0, "preference", (16, 1, side, side)))
            for prompt, condition in zip(prompts, conditions, strict=True)
            for i in range(self.pictures)
        ]
        latents = painter.latents([r.to(painter.device) for r in requests])
        if not self.studio.engine.layout.speaks:
            return
        images = [to_uint8(picture) for picture in painter.decode(latents)]
        asked = [prompt for prompt in prompts for _ in range(self.pictures)]
        scores = self.reward(images, [p.text for p in asked], [p.metadata for p in asked])["reward"]
        for number, (prompt, rewards) in enumerate(zip(prompts, scores.split(self.pictures), strict=True)):
            if (chosen := best_and_worst(rewards, self.min_gap)) is None:
                continue
            for index, name in zip(chosen, ("win", "lose"), strict=True):
                meta = prompt.metadata | {"caption": prompt.text, "source": "drawn", "reward": float(rewards[index])}
                latent, txt = latents[number * self.pictures + index], conditions[number].txt
                yield EncodedSample(f"{prompt.key}-{name}", latent.float().cpu(), txt.bfloat16(), meta=meta)


def pair_settings(config: Any) -> dict[str, Any]:
    """All of a DPO run's config that its pairs depend on, as JSON gives it back."""
    names = ("init", "components", "pairs", "num_pairs", "prompts", "rewards", "pictures", "min_gap", "size_px")
    values = {name: getattr(config, name) for name in (*names, "sampling_steps", "cfg_scale")}
    return json.loads(json.dumps(values | {"seed": config.loop.seed}, default=str))


def is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether `write_pairs` has finished a folder; ValueError if other settings than these began it."""
    if (folder / SETTINGS).is_file():
        there = json.loads((folder / SETTINGS).read_text())
        if differences := [f"{n}: {there.get(n)} there, {v} here" for n, v in settings.items() if there.get(n) != v]:
            raise ValueError(
                f"the pairs in {folder} were made otherwise ({'; '.join(differences)}); delete that folder"
            )
    return (folder / "dataset.json").is_file()


def write_pairs(
    folder: Path,
    settings: dict[str, Any],
    items: list[Any],
    make: Callable[[list[Any]], Iterable[EncodedSample]],
    wanted: int,
    encoder: Encoder,
    engine: "Engine",
    show: Callable[[int], None],
) -> int:
    """Write the pairs that `make` yields for a shard's items until there are `wanted`; returns how many there are.

    Data-parallel ranks take shards of `ITEMS_PER_SHARD` items in turns; their peers work along and do not write. A
    finished shard is kept, so that an interrupted call goes on. Which pairs come first does not depend on the number of
    ranks. `show` is told how many there are so far. With any pairs, the folder becomes an encoded data set.
    """
    if engine.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, settings)
    torch.distributed.barrier()
    shards = [items[i : i + ITEMS_PER_SHARD] for i in range(0, len(items), ITEMS_PER_SHARD)]
    found = 0
    for first in range(0, len(shards), engine.dp_size):
        mine = first + engine.dp_rank
        if mine < len(shards) and not (folder / shard_name(mine)).exists():
            samples = list(make(shards[mine]))
            if engine.layout.speaks:
                write_encoded(folder / shard_name(mine), samples)
        torch.distributed.barrier()
        turn = range(first, min(first + engine.dp_size, len(shards)))
        found += sum(len(tar_index(folder / shard_name(i)).entries) // 2 for i in turn)
        show(found)
        if found >= wanted:
            break
    if found and engine.rank == 0:
        encoder.write_description(folder)
    torch.distributed.barrier()
    return found


def list_judged(folder: Path) -> list[tuple[str, Path, Path, Path]]:
    """(key, winner, loser, prompt) of a folder with KEY.win.png, KEY.lose.png and KEY.txt (jpg and webp too).

    Raises ValueError that names what is missing.
    """
    sides: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := _PICTURE.fullmatch(path.name):
            sides.setdefault(match["key"], {})[match["side"]] = path
    if not sides:
        raise ValueError(f"{folder} holds no pairs of pictures; name them KEY.win.png, KEY.lose.png and KEY.txt")
    for key, found in sides.items():
        missing = [f"{key}.{s}.png" for s in ("win", "lose") if s not in found]
        missing += [] if (folder / f"{key}.txt").is_file() else [f"{key}.txt"]
        if missing:
            raise ValueError(f"{folder}: {' and '.join(missing)} missing")
    return [(key, found["win"], found["lose"], folder / f"{key}.txt") for key, found in sides.items()]


def encode_pair(encoder: Encoder, judged: tuple[str, Path, Path, Path]) -> Iterator[EncodedSample]:
    """Winner and loser of one judged pair at the encoder's resolution; ValueError names what is wrong."""
    key, win, lose, prompt = judged
    caption = prompt.read_text(encoding="utf-8").strip()
    if not caption:
        raise ValueError(f"{prompt} is empty; it should hold the prompt of both pictures")
    (txt,) = encoder.conditioner.encode([caption])
    pixels = [_fitted(path, encoder.res) for path in (win, lose)]
    if pixels[0].shape != pixels[1].shape:
        raise ValueError(f"{win} and {lose} have different shapes; both pictures of a pair need one aspect ratio")
    batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)[:, :, None]
    batch = batch.to(next(encoder.vae.parameters()).device).float() / 127.5 - 1
    for name, latent in zip(("win", "lose"), encoder.vae.encode_latent(batch).float().cpu(), strict=True):
        meta = {"caption": caption, "source": "judged"}
        yield EncodedSample(f"{re.sub('[./]', '_', key)}-{name}", latent, txt.bfloat16().cpu(), meta=meta)


def _fitted(path: Path, res: int) -> np.ndarray:
    try:
        return fit(decode(path.read_bytes()), res)[0]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
