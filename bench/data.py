"""Curation of photographs at 640 px: stages 1 and 2 against decoding alone and against decoding plus each score once.

All run alternately on the same shards with the same number of processes, after a first round that isn't counted:

decode   each picture is decoded
scores   each picture is decoded and every filter of stages 1 and 2 that needs no weights is called once
curate   the command's three passes (score, decide, write), its reading, thumbnails, checks and files included

Printed are medians over the rounds with their range, and the median of the rounds' ratios.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

try:
    from command_line import run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config:
    pictures: int = 600
    size: int = 640
    """Pictures have about the area of a square with this side."""
    workers: int = os.cpu_count() or 1
    rounds: int = 3
    out: Path | None = None
    """Also write the rows as JSON."""


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = make_pictures(config, Path(folder) / "raw")
        cases: dict[str, Callable[[], None]] = {
            "decode": partial(in_processes, decode_all, data, config.workers),
            "scores": partial(in_processes, score_all, data, config.workers),
            "curate": partial(curate, data, Path(folder) / "curated", config.workers),
        }
        rounds = [{name: seconds(case) for name, case in cases.items()} for _ in range(config.rounds + 1)][1:]
    rows = [row(name, config, [r[name] for r in rounds], [r["curate"] / r[name] for r in rounds]) for name in cases]
    for r in rows:
        print(
            f"{r['case']:7} {r['per_s']:6.1f} pictures/s ({r['least_per_s']:.1f}-{r['most_per_s']:.1f}) "
            f"at {r['size']} px, {r['workers']} processes; curate takes {r['curate_over_this']:.2f} x this"
        )
    if config.out:
        config.out.write_text(json.dumps(rows, indent=1))


def row(name: str, config: Config, times: list[float], ratios: list[float]) -> dict:
    return {
        "case": name,
        "size": config.size,
        "workers": config.workers,
        "per_s": config.pictures / statistics.median(times),
        "least_per_s": config.pictures / max(times),
        "most_per_s": config.pictures / min(times),
        "curate_over_this": statistics.median(ratios),
    }


def seconds(case: Callable[[], None]) -> float:
    start = time.perf_counter()
    case()
    return time.perf_counter() - start


def make_pictures(config: Config, folder: Path) -> Path:
    """Photographs as JPEG, in four shards of equal size."""
    from data_pipeline.parallel import map_ordered
    from data_pipeline.shards import shard_name, write_raw
    from data_pipeline.synthesis.kinds import Recipe, make_job

    recipe = Recipe((("photo", 1.0),), config.size, seed=0)
    recipe.load()
    samples = list(map_ordered(partial(make_job, recipe), ((i, None) for i in range(config.pictures)), config.workers))
    folder.mkdir()
    for shard in range(4):
        write_raw(folder / shard_name(shard), samples[shard::4])
    return folder


def in_processes(function: Callable[[list[Path]], None], data: Path, workers: int) -> None:
    """`function` of an equal part of the shards in each of `workers` processes."""
    from data_pipeline.parallel import map_ordered
    from data_pipeline.shards import list_shards

    shards = list_shards(data)
    for _ in map_ordered(function, [shards[i::workers] for i in range(workers)], workers, chunk=1):
        pass


def decode_all(shards: list[Path]) -> None:
    from data_pipeline.pictures import decode
    from data_pipeline.shards import read_raw

    for shard in shards:
        for sample in read_raw(shard):
            decode(sample.image)


def score_all(shards: list[Path]) -> None:
    from data_pipeline.filters.table import FILTERS
    from data_pipeline.filters.view import View
    from data_pipeline.shards import read_raw
    from data_pipeline.stages import REPORT

    names = [
        r.filter for stage in REPORT[:2] for r in stage.rules if r.filter in FILTERS and not FILTERS[r.filter].needs
    ]
    for shard in shards:
        for sample in read_raw(shard):
            view = View(sample)
            for name in names:
                FILTERS[name](view)


def curate(data: Path, out: Path, workers: int) -> None:
    from data_pipeline.curation import Curation
    from data_pipeline.filters.tools import Tools
    from data_pipeline.shard_stage import shards_as_inputs
    from data_pipeline.stages import REPORT

    shutil.rmtree(out, ignore_errors=True)
    curation = Curation(data, out, REPORT[:2], shards_as_inputs(data, out), Tools())
    curation.score(workers, lambda: None)
    curation.write(curation.decide(), lambda: None)


if __name__ == "__main__":
    run(main, Config)
