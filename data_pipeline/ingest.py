"""Bring your own data into the line: a folder of pictures with captions, or webdataset tars, to raw shards.

A caption is NAME.txt or NAME.json ("caption") beside NAME.jpg (or png, webp, avif, bmp, tif, gif). Run it again to
go on.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from command_line import UserError, progress, run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

if TYPE_CHECKING:
    from data_pipeline.user_data import PictureFile

LISTED = 5
"""Bad files that a message names."""


@dataclass(frozen=True)
class Config:
    data: Path | None = None
    """Required: a folder of pictures with captions, a folder of tars, or a tar."""
    out: Path = Path("runs/quick/data/raw")
    """Folder for the raw shards."""
    shard_size: int = 256
    """Pictures per shard; a tar becomes one shard, whatever its size."""
    skip_bad: bool = False
    """Leave files out that cannot be used, instead of refusing the folder."""
    dry_run: bool = False
    """Say what would be done, do nothing."""


def main(config: Config) -> None:
    if config.data is None:
        raise UserError("--data is missing: a folder of pictures with captions, or of tars")
    if not config.data.exists():
        raise UserError(f"{config.data} does not exist; --data takes a folder of pictures with captions or of tars")
    if config.data.is_dir() and config.out.resolve().is_relative_to(config.data.resolve()):
        raise UserError(f"the output folder {config.out} is inside {config.data}; choose another --out")
    from data_pipeline.user_data import find_pictures, find_tars

    tars = find_tars(config.data)
    pictures = {} if config.data.is_file() else find_pictures(config.data)
    if tars and pictures:
        raise UserError(f"{config.data} holds both tars and loose pictures; give a folder with one kind")
    if not tars and not pictures:
        raise UserError(f"{config.data} holds no pictures (jpg, png, webp, avif, bmp, tif, gif) and no tars")
    if config.dry_run:
        print(f"{len(tars)} tars" if tars else f"{len(pictures)} pictures", f"of {config.data} -> {config.out}")
        return
    from data_pipeline.shard_stage import say_skipped

    stage = ingest_tars(tars, config) if tars else ingest_pictures(pictures, config)
    records = stage.records()
    say_skipped(records, config.out)
    samples = sum(record["samples"] for record in records)
    if not samples:
        raise UserError(f"no picture of {config.data} can be used; see the lines above")
    print(f"{samples} pictures in {len(records)} shards: {config.out}")


def ingest_tars(tars: list[Path], config: Config):
    """Write a raw shard of each tar, passing over what is damaged."""
    from data_pipeline.shard_stage import ShardStage, file_stamp
    from data_pipeline.shards import Problem, shard_name, write_raw
    from data_pipeline.user_data import name_of, read_tar

    sources = {shard_name(i): tar for i, tar in enumerate(tars)}
    inputs = {name: {"tar": name_of(tar, config.data.parent), **file_stamp(tar)} for name, tar in sources.items()}
    stage = ShardStage(config.out, inputs, {})
    config.out.mkdir(parents=True, exist_ok=True)
    with progress(len(sources), "ingest", "tar", done=len(sources) - len(stage.pending())) as bar:
        for name in stage.pending():
            problems: list[Problem] = []
            tar = sources[name]
            of = name_of(tar.with_suffix(""), config.data) if config.data.is_dir() else None
            n = write_raw(stage.target(name), read_tar(tar, problems.append, of))
            stage.finish(name, {"samples": n, "skipped": [asdict(p) for p in problems]})
            bar.update()
    return stage


def ingest_pictures(pictures: dict[Path, list[Path]], config: Config):
    """Write raw shards of a folder's pictures. UserError, with nothing written, names those that cannot be used."""
    from concurrent.futures import ThreadPoolExecutor

    from data_pipeline.shard_stage import ShardStage
    from data_pipeline.shards import Problem, shard_name, write_raw
    from data_pipeline.user_data import PictureFile, find_unread, name_of

    files = [PictureFile(path, name_of(path, config.data), tuple(parts)) for path, parts in pictures.items()]
    groups = {
        shard_name(i): files[at : at + config.shard_size]
        for i, at in enumerate(range(0, len(files), config.shard_size))
    }
    stage = ShardStage(
        config.out, {name: stamps(group) for name, group in groups.items()}, {"skip_bad": config.skip_bad}
    )
    pending = stage.pending()
    bad = check([file for name in pending for file in groups[name]])
    unread = dict.fromkeys(find_unread(config.data), "is of a kind that is not read; save it as jpg or png")
    wrong = bad | unread
    if wrong and not config.skip_bad:
        listed = "; ".join(f"{name} {what}" for name, what in list(wrong.items())[:LISTED])
        more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise UserError(
            f"{len(wrong)} of {len(files) + len(unread)} pictures: {listed}{more}. Mend them, or leave them out with "
            "--skip-bad"
        )
    if unread:
        print(f"left out {len(unread)} files of kinds that are not read, as {next(iter(unread))}")
    config.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        for name in pending:
            good = [file for file in groups[name] if file.name not in bad]
            left_out = [Problem(name, file.name, bad[file.name]) for file in groups[name] if file.name in bad]
            n = write_raw(stage.target(name), pool.map(PictureFile.read, good))
            stage.finish(name, {"samples": n, "skipped": [asdict(p) for p in left_out]})
    return stage


def stamps(group: "list[PictureFile]") -> str:
    """Changes when one of the files or captions does."""
    import hashlib

    from data_pipeline.shard_stage import file_stamp

    found = [(p.name, *file_stamp(p).values()) for file in group for p in (file.path, *file.caption_files, *file.parts)]
    return hashlib.blake2b(repr([[file.name for file in group], found]).encode(), digest_size=16).hexdigest()


def check(files: "list[PictureFile]") -> dict[str, str]:
    """Decode all pictures and read all captions: name of each that cannot be used -> why."""
    from concurrent.futures import ThreadPoolExecutor

    def problem(file: "PictureFile") -> str | None:
        try:
            file.read()
        except ValueError as error:
            return str(error)
        return None

    bad = {}
    with ThreadPoolExecutor() as pool, progress(len(files), "check", "picture") as bar:
        for file, what in zip(files, pool.map(problem, files), strict=True):
            bar.update()
            if what is not None:
                bad[file.name] = what
    return bad


if __name__ == "__main__":
    run(main, Config)
