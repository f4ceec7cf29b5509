"""Curate raw shards: score each picture and caption, drop what fails, and write an audit that shows what and why.

Writes the kept samples, their scores in the record, and audit.json and audit.html. Run it again to go on.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

try:
    from command_line import UserError, progress, run
    from data_pipeline.stages import chosen_stages
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config:
    data: Path = Path("runs/quick/data/raw")
    """Folder of raw shards."""
    out: Path = Path("runs/quick/data/curated")
    """Folder for the kept samples."""
    recipe: Literal["toy", "report"] = "toy"
    """Stages and thresholds (data_pipeline/stages.py); toy takes pictures from 48 px on, report from 256 px on."""
    stages: str = "1-3"
    """Stages to run, as 1-3 or 1,3."""
    filters: tuple[str, ...] = ()
    """More rules: NAME=THRESHOLD, or FILE.py:NAME=THRESHOLD of your own; LOW..HIGH for scores that lie between."""
    components: Path | None = None
    """Folder with the tokenizer/ that counts tokens."""
    weights: Path | None = None
    """Folder with clip/, siglip/, nsfw/, aesthetics/ for the filters that need networks; those not there don't run."""
    workers: int = os.cpu_count() or 1
    """Processes that score pictures."""
    dry_run: bool = False
    """Print the rules, do nothing."""


def main(config: Config) -> None:
    from data_pipeline.filters.table import rule_of
    from data_pipeline.shard_stage import say_skipped, shards_as_inputs

    stages = chosen_stages(config.recipe, config.stages, tuple(map(rule_of, config.filters)))
    inputs = shards_as_inputs(config.data, config.out)
    if config.dry_run:
        print(f"{len(inputs)} shards of {config.data} -> {config.out}")
        for stage in stages:
            print(f"stage {stage.number}, {stage.name}: {'; '.join(map(str, stage.rules))}")
        return
    from data_pipeline.curation import Curation
    from data_pipeline.filters.tools import Tools

    for folder in filter(None, (config.components, config.weights)):
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist")
    curation = Curation(config.data, config.out, stages, inputs, Tools(config.components, config.weights))
    score(curation, config.workers)
    shards = curation.decide()
    with progress(len(shards), "write", "shard") as bar:
        written = curation.write(shards, bar.update)
        bar.update(bar.total - bar.n)
    result = write_audit(curation, shards)
    say_skipped(written.records(), config.out)
    for f in result["filters"]:
        if f["not_run"]:
            print(f"{f['filter']}: not run: {f['not_run']}")
    print(f"kept {result['kept']} of {result['samples']} samples: {config.out}; audit: {config.out / 'audit.html'}")
    if not result["kept"]:
        raise UserError(f"every sample was dropped; see {config.out / 'audit.html'}")


def score(curation, workers: int) -> None:
    """The first pass, with a progress bar over the samples of unfinished shards."""
    from data_pipeline.tar_index import tar_index

    pending = curation.scoring.pending()
    total = sum(len(tar_index(curation.data / Path(name).with_suffix(".tar")).entries) for name in pending)
    with progress(total, "score", "sample") as bar:
        curation.score(workers, bar.update)


def write_audit(curation, shards: dict) -> dict:
    """Write audit.json and audit.html; returns the audit."""
    from data_pipeline.audit import audit, audit_page
    from data_pipeline.shards import raw_picture
    from files import atomic_file, write_json

    result = audit(curation.stages, shards, curation.tools)
    write_json(curation.out / "audit.json", result)
    picture = lambda shard, key: raw_picture(curation.data / shard, key)  # noqa: E731
    page = audit_page(result, shards, picture, f"Audit of {curation.data.name}")
    with atomic_file(curation.out / "audit.html") as file:
        file.write(page)
    return result


if __name__ == "__main__":
    run(main, Config)
