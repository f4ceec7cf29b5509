"""Annotate raw shards with a vision-language model: long and short captions, type, style, domain, watermarks, defects.

The model answers in this process (--local.folder) or behind an OpenAI-compatible server (--server.url, --server.model;
the key, if it wants one, in OPENAI_API_KEY). What cannot be annotated keeps its caption. Run it again to go on; under
torchrun each process takes its share of the shards.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    from command_line import UserError, progress, run
    from data_pipeline.annotation import AGAIN, FUSED, QUESTION, Annotator, Splits
    from vlm.local import LocalConfig, LocalVLM
    from vlm.server import ChatServer, ServerConfig
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config:
    data: Path = Path("runs/quick/data/curated")
    """Folder of raw shards."""
    out: Path = Path("runs/quick/data/annotated")
    """Folder for the same shards with annotations in their records."""
    server: ServerConfig = ServerConfig(deadline_s=300.0, attempts=4, max_tokens=1024)
    local: LocalConfig = LocalConfig()
    splits: Splits = Splits()
    attempts: int = 3
    """Answers that are asked for until one is valid JSON with all fields."""
    concurrency: int = 16
    """Questions that the server is asked at once."""
    dry_run: bool = False
    """Say what would be done, do nothing."""


def main(config: Config) -> None:
    if bool(config.server.url) == bool(config.local.folder):
        raise UserError("give one model: --local.folder, or --server.url http://HOST:PORT/v1 with --server.model")
    if min(config.attempts, config.concurrency) < 1:
        raise UserError("--attempts and --concurrency must be at least 1")
    from data_pipeline.claims import Claims
    from data_pipeline.shard_stage import ShardStage, say_skipped, shards_as_inputs

    inputs = shards_as_inputs(config.data, config.out)
    if config.dry_run:
        print(f"{len(inputs)} shards of {config.data} -> {config.out}, {config.splits}")
        return
    model = ChatServer(config.server) if config.server.url else LocalVLM(config.local)
    asked = hashlib.blake2b((QUESTION + FUSED + AGAIN).encode(), digest_size=8).hexdigest()
    settings = {"model": model.fingerprint, "asked": asked, "attempts": config.attempts}
    stage = ShardStage(config.out, inputs, settings | {"splits": asdict(config.splits)})
    config.out.mkdir(parents=True, exist_ok=True)
    threads = config.concurrency if config.server.url else 1
    annotator = Annotator(model.ask, config.splits, config.attempts)
    claims = Claims(config.out / "claims")
    try:
        annotate_shards(stage, claims, config.data, annotator, threads)
    finally:
        claims.close()
    records = stage.records()
    say_skipped(records, config.out)
    samples, annotated = (sum(record[name] for record in records) for name in ("samples", "annotated"))
    print(f"annotated {annotated} of {samples} samples in {len(records)} shards: {config.out}")


def annotate_shards(stage, claims, data: Path, annotator: Annotator, threads: int) -> None:
    """Annotate shards of `data` until all are there, with a progress bar over the samples that were not."""
    from data_pipeline.tar_index import tar_index

    total = sum(len(tar_index(data / name).entries) for name in stage.pending())
    with progress(total, "annotate", "sample") as bar:
        for name in stage.work(claims):
            stage.finish(name, annotate_shard(data / name, stage.target(name), annotator, threads, bar.update))
        bar.update(bar.total - bar.n)  # what others have made meanwhile


def annotate_shard(source: Path, target: Path, annotator: Annotator, threads: int, on_sample) -> dict:
    """Write `target` from `source`; returns the numbers of samples and annotated ones, and what was passed over."""
    from data_pipeline.shards import Problem, read_raw, write_raw

    problems: list[Problem] = []
    annotated = 0

    def samples():
        nonlocal annotated
        for sample in annotator.annotate_all(read_raw(source, problems.append), threads, source.name, problems.append):
            annotated += "annotation" in sample.meta
            on_sample()
            yield sample

    n = write_raw(target, samples())
    return {"samples": n, "annotated": annotated, "skipped": [asdict(p) for p in problems]}


if __name__ == "__main__":
    run(main, Config)
