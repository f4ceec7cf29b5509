"""Make synthetic training pictures with captions, as shards: text, scenes, layouts, shapes, photographs, edit pairs.

Every sample is a function of the seed and its index: any number of workers writes the same bytes, and a run that was
interrupted goes on when it is started again.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

try:
    from command_line import UserError, progress, run
except ModuleNotFoundError:
    raise SystemExit("not installed: run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config:
    """What to make."""

    out: Path = Path("runs/synthetic")
    """Folder for the shards."""
    kinds: str = "text,shapes,photo"
    """Kinds of pictures, with shares if they differ: text:2,shapes,photo:0.5."""
    count: int = 1000
    """Samples in all."""
    size: int = 256
    """Pictures have about the area of a square with this side, in pixels (a multiple of 16), in nine aspect ratios."""
    seed: int = 0
    corpus: Path | None = None
    """UTF-8 text to draw, a paragraph a line: a .txt file or a folder of them. Default: a small embedded one."""
    templates: Path | None = None
    """Folder of .toml templates for layouts. Default: the embedded ones."""
    photos: tuple[str, ...] | None = None
    """File names of the embedded photographs to draw from, say chelsea.png coffee.png. Default: all."""
    min_occurrences: int = 0
    """Draw passages so that every character that the corpus has and a font covers appears in this many text samples."""
    shard_size: int = 500
    """Samples in a shard."""
    workers: int = os.cpu_count() or 1
    """Processes."""
    dry_run: bool = False
    """Only say what would be made."""


def main(config: Config) -> None:
    from data_pipeline.parallel import map_ordered
    from data_pipeline.shards import shard_name, write_raw
    from data_pipeline.synthesis.kinds import Recipe, Sources, make_job, parse_kinds

    if min(config.count, config.shard_size, config.workers) < 1:
        raise UserError("--count, --shard-size and --workers must be at least 1")
    if config.size < 32 or config.size % 16:
        raise UserError(f"--size must be a multiple of 16 from 32 on, not {config.size}")
    sources = Sources(config.corpus, config.templates, config.photos)
    recipe = Recipe(parse_kinds(config.kinds), config.size, config.seed, sources)
    starts = range(0, config.count, config.shard_size)
    shards = {
        config.out / shard_name(i): range(s, min(s + config.shard_size, config.count)) for i, s in enumerate(starts)
    }
    todo = {path: indices for path, indices in shards.items() if not path.exists()}
    left = sum(map(len, todo.values()))
    print(
        f"{config.out}: {config.count} samples of {config.kinds} in {len(shards)} shards, {config.count - left} there"
    )
    if config.dry_run:
        return
    recipe.load()
    _require_same(config, recipe.sources_read())
    passages = recipe.passages(config.count, config.min_occurrences) if config.min_occurrences else {}
    jobs = ((i, passages.get(i)) for indices in todo.values() for i in indices)
    samples = map_ordered(partial(make_job, recipe), jobs, config.workers)
    with progress(config.count, "synthesize", "sample", done=config.count - left) as bar:
        for path, indices in todo.items():
            write_raw(path, _count(islice(samples, len(indices)), bar))


def _require_same(config: Config, sources: dict[str, dict[str, str]]) -> None:
    """Note in the folder what it is made of; UserError if it was begun with other settings or other sources.

    Corpus, templates, photographs and fonts are told by their contents, so where they lie doesn't matter.
    """
    import json

    from files import write_json

    names = ("kinds", "count", "size", "seed", "photos", "min_occurrences", "shard_size")
    wanted = {n: getattr(config, n) for n in names}
    wanted["photos"] = config.photos and sorted(set(config.photos))
    path = config.out / "synthesis.json"
    config.out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_json(path, wanted | sources)
    there = json.loads(path.read_text())
    if differing := [n for n in names if there.get(n) != wanted[n]]:
        what = ", ".join(f"--{n.replace('_', '-')} {_as_flag(there.get(n))}" for n in differing)
        raise UserError(f"{config.out} was begun with {what}; choose another --out or delete the folder")
    for what, here in sources.items():
        if changes := _changes(there.get(what, here), here):
            raise UserError(f"{config.out} was begun with other {what} ({changes}); use those, or choose another --out")


def _as_flag(value: object) -> object:
    return " ".join(value) if isinstance(value, list) else value


def _changes(there: dict[str, str], here: dict[str, str]) -> str:
    """In words, naming the first few: which sources are gone, new or other files; '' if none."""
    changes = {
        "gone": sorted(there.keys() - here.keys()),
        "new": sorted(here.keys() - there.keys()),
        "changed": sorted(name for name in there.keys() & here.keys() if there[name] != here[name]),
    }
    named = {what: ", ".join(n[:3]) + (f" and {len(n) - 3} more" if len(n) > 3 else "") for what, n in changes.items()}
    return "; ".join(f"{what}: {names}" for what, names in named.items() if names)


def _count(samples: Iterable, bar) -> Iterator:
    for sample in samples:
        yield sample
        bar.update()


if __name__ == "__main__":
    run(main, Config)
