"""Were the data encoded by the networks that a run draws with? A model that learnt one VAE's latents draws nothing
through another's decoder, and says nothing about it."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch

from data_pipeline.dataset import content_hash, read_fingerprint
from data_pipeline.encoding import ENCODING_VERSION
from data_pipeline.live import LIVE
from data_pipeline.sample import Fingerprint
from files import write_json
from model.conditioner import Conditioner
from vae.autoencoder import VAE

FORMAT = 1
"""Grows with a change of how fingerprints are made."""


def require_encoded_with(components: Path, folders: Iterable[Path]) -> None:
    """ValueError that names every difference between what the data in `folders` were encoded with and `components`.

    What `components` lacks, a text encoder say, is not compared; a folder that is gone neither.
    """
    folders = [folder for folder in folders if any((folder / name).exists() for name in ("dataset.json", LIVE))]
    found = components_fingerprint(components) if folders else {}
    for folder in folders:
        there = read_fingerprint(folder, growing=True)
        mine: Fingerprint = replace(there, **found)
        try:
            mine.require(there, str(folder))
        except ValueError as error:
            raise ValueError(f"{error}, or give --components that it was encoded with, not {components}") from None


def components_fingerprint(components: Path) -> dict[str, str | int]:
    """The fields of `Fingerprint` that networks decide, of those that `components` has.

    A text encoder of 7B takes a minute to read, so the answer is kept for as long as no file there changes.
    """
    files = [f for name in ("vae", "text_encoder", "tokenizer", "processor") for f in (components / name).rglob("*")]
    stamps = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files) if f.is_file()]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = f"{content_hash([FORMAT, ENCODING_VERSION, stamps])}.json"
    cache = Path(home) / "open-qwen-image" / "fingerprints" / name
    with suppress(OSError, ValueError):
        known = json.loads(cache.read_text())
        if isinstance(known, dict) and known.keys() <= asdict(Fingerprint("", "", "", 0)).keys():
            return known
    found: dict[str, str | int] = {"version": ENCODING_VERSION}
    if (components / "vae").is_dir():
        found["vae"] = VAE.from_folder(components).fingerprint()
    if (components / "text_encoder").is_dir():
        read = Conditioner.from_folder(components, dtype=torch.bfloat16)  # as which its weights count
        found["text_encoder"], found["template"] = read.fingerprint()
    with suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache, found)
    return found
