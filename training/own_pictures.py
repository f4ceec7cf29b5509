"""A user's folder of pictures with captions, encoded before training by processes that end before it begins, so that
text encoder and VAE never share a card with the model that trains."""

import json
import os
import time
from pathlib import Path

from command_line import UserError
from files import write_json
from training.demo_data import run_script

NOTE = "pictures.json"
"""File that says which pictures have been encoded, written when they all are."""


def encode_pictures(pictures: Path, components: Path, side_px: int, out: Path, *flags: str) -> Path:
    """The encoded data set of a folder's pictures, below `out`; rank 0 makes what is missing, the others wait for it.

    `flags` are more of `data_pipeline/ingest.py`. UserError for a folder that is none.
    """
    if not pictures.is_dir():
        raise UserError(
            f"{pictures} is no folder; --pictures takes one of pictures with captions (NAME.txt beside each)"
        )
    raw, encoded, note = out / "raw", out / f"encoded-{side_px}", out / NOTE
    wanted = {"folder": named(pictures), "side_px": side_px, "files": stamp(pictures)}
    if os.environ.get("RANK", "0") == "0" and _noted(note) != wanted:
        note.unlink(missing_ok=True)
        run_script("data_pipeline/ingest.py", "--data", pictures, "--out", raw, *flags)
        where = ("--data", raw, "--components", components, "--res", side_px, "--out", encoded)
        run_script("data_pipeline/produce.py", *where)
        write_json(note, wanted)
    while _noted(note) != wanted:
        time.sleep(1)
    return encoded


def named(pictures: Path) -> str:
    """How the note calls a folder."""
    from data_pipeline.user_data import legible

    return legible(pictures.resolve())


def is_encoded_from(pictures: Path, data: tuple[Path, ...]) -> bool:
    """Whether data sets, as a run's config.toml names them beside its pictures, are these pictures, encoded."""
    note = _noted(data[0].parent / NOTE) if len(data) == 1 else None
    return note is not None and note["folder"] == named(pictures)


def stamp(folder: Path) -> dict[str, list[int]]:
    """Size and time of a tar, or of all pictures, captions and tars of a folder; changes when one of them does."""
    from data_pipeline.user_data import CAPTIONS, PICTURES, list_files, name_of

    kinds = {*PICTURES, *CAPTIONS, "tar"}
    files = list_files(folder) if folder.is_dir() else [folder]
    found = ((name_of(p, folder), p.stat()) for p in files if p.suffix[1:].lower() in kinds)
    return {name: [s.st_size, s.st_mtime_ns] for name, s in found}


def _noted(note: Path) -> dict | None:
    return json.loads(note.read_text()) if note.exists() else None
