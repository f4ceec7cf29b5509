"""Small encoded data sets whose records tell of text, source, domain and scores."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from data_pipeline.sample import EncodedSample, Fingerprint
from data_pipeline.shards import shard_name, write_encoded

LETTERS = {"none": 0, "words": 10, "sentences": 100, "paragraphs": 400}
"""Letters of a picture's text, by its kind."""


def record(text: str = "none", source: str = "photo", **more: object) -> dict:
    meta = {"caption": "c", "source": source, **more}
    lines = [{"text": "x" * LETTERS[text], "box": [0, 0, 9, 9]}]
    return meta | ({"lines": lines} if text != "none" else {})


def write(
    folder: Path, records: list[dict], shards: int = 5, resolution: int = 64,
    shape: Callable[[int], tuple[int, int, int]] = lambda i: (2, 2, 1 + i % 3), width: int = 8,
) -> Path:  # fmt: skip
    """A data set of these records; `shape` gives (height, width of the latent, tokens of the prompt) of each sample."""
    folder.mkdir(parents=True)
    samples = [
        EncodedSample(f"k{i:04d}", torch.zeros(16, 1, h, w), torch.zeros(txt, width).bfloat16(), meta=meta)
        for (h, w, txt), (i, meta) in zip(map(shape, range(len(records))), enumerate(records), strict=True)
    ]
    for s in range(shards):
        write_encoded(folder / shard_name(s), samples[s::shards])
    fingerprint = Fingerprint(vae="v", text_encoder="t", template="p", resolution=resolution)
    (folder / "dataset.json").write_text(json.dumps({"fingerprint": asdict(fingerprint)}))
    save_file({"txt": torch.ones(2, width).bfloat16()}, folder / "empty.safetensors")
    return folder
