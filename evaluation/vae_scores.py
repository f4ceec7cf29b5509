"""`--suite vae`: a model's VAE alone, on held-out pages and photographs: scores.json and a page of pictures."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from command_line import UserError
from data_pipeline.sample import RawSample
from data_pipeline.shards import list_shards, read_raw
from data_pipeline.synthesis.kinds import Recipe
from evaluation.ocr import Tesseract
from evaluation.report import plain
from evaluation.vae_suite import reconstruction_rows, summary
from files import write_json
from training.source import look
from vae.autoencoder import VAE

PICTURES, SIDE, SEED = 96, 256, 20_250_802
"""The embedded pictures: two of three are pages of text, the rest crops of photographs; no data set has this seed."""


def measure_vae(
    source: str, components: Path | None, raw: Path | None, limit: int | None, folder: Path
) -> dict[str, Any]:
    """Reconstruct pictures of raw shards, or the embedded ones, and write what is lost; returns scores.json's data.

    Text is read only where Tesseract is installed; the reason stands under `not run`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        reader, absent = Tesseract(), {}
    except UserError as error:
        reader, absent = None, {"text": str(error)}
    vae = VAE.from_folder(components or _components(source)).eval()
    samples = itertools.islice(_pictures(raw), limit or PICTURES)
    with torch.no_grad():
        rows = reconstruction_rows(vae, samples, reader, folder / "index.html")
    table = {domain: {k: plain(e) for k, e in measures.items()} for domain, measures in summary(rows).items()}
    data = {"source": source, "fingerprint": vae.fingerprint(), "suites": {"vae": table}, "not run": absent}
    write_json(folder / "scores.json", data)
    return data


def _components(source: str) -> Path:
    return Path(source) if (Path(source) / "vae").is_dir() else look(source).components()


def _pictures(raw: Path | None) -> Iterator[RawSample]:
    if raw is not None:
        return itertools.chain.from_iterable(map(read_raw, list_shards(raw)))
    recipe = Recipe((("text", 2.0), ("photo", 1.0)), SIDE, SEED)
    return map(recipe.make, itertools.count())
