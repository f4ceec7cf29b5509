"""What a model is, as a hash, without loading it: pictures drawn once are found again."""

import hashlib
import json
from pathlib import Path

from files import hash_files
from model.diffusers_io.folder import locate
from training.source import run_components, run_folder

PARTS = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler", "processor")


def fingerprint(source: str, ema: bool, components: Path | None, precision: str) -> str:
    """Hash of all that decides a source's pictures: weights, text encoder, VAE, precision.

    Of a run, the newest intact checkpoint's manifest stands for its files; else files are read. Raises UserError or
    ValueError if there is no model.
    """
    if run := run_folder(source):
        from training.engine.checkpoint import MANIFEST, resolve

        weights = hash_files([resolve(Path(source)) / MANIFEST]) + f" ema {ema}"
        components = components or run_components(run)
    else:
        folder = locate(source)
        weights = _hash_folders(folder, ("transformer",))
        components = components or folder
    return hashlib.blake2b(
        json.dumps([weights, _hash_folders(components, PARTS[1:]), precision]).encode(), digest_size=16
    ).hexdigest()


def _hash_folders(folder: Path, parts: tuple[str, ...]) -> list[str]:
    files = {part: sorted(p for p in (Path(folder) / part).glob("*") if p.is_file()) for part in parts}
    return [f"{part} {hash_files(paths)}" for part, paths in files.items()]
