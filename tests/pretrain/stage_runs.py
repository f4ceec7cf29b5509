"""Data for stages of pretraining, and its scripts run as ranks of a world."""

import json
import os
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from safetensors.torch import save_file
from worlds import run_world

from data_pipeline.encoding import ENCODING_VERSION
from data_pipeline.sample import EncodedSample
from data_pipeline.shards import shard_name, write_encoded

ROOT = Path(__file__).parents[2]


def make_data(folder: Path, side_px: int, width: int = 128, vae: str = "v") -> Path:
    """An encoded data set of noise in three aspect ratios, as if by the VAE of that fingerprint."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(side_px)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    side = side_px // 8
    sizes = [(side, side), (side - 2, side + 2), (side + 2, side - 2)]
    samples = [
        EncodedSample(f"k{i}", normal(16, 1, *sizes[i % 3]), normal(3 + i, width).bfloat16(), meta={"caption": f"{i}"})
        for i in range(4)
    ]
    write_encoded(folder / shard_name(0), samples)
    save_file({"txt": normal(2, width).bfloat16()}, folder / "empty.safetensors")
    fingerprint = {"vae": vae, "text_encoder": "t", "template": "m", "resolution": side_px, "version": ENCODING_VERSION}
    (folder / "dataset.json").write_text(json.dumps({"fingerprint": fingerprint}))
    return folder


def entry(
    rank: int, arguments: list[str], environment: dict[str, str] | None = None, script: str = "stage"
) -> tuple[object, str, str]:
    """(exit status, stdout, stderr) of a script, run in this process."""
    os.environ.update(environment or {})
    sys.argv = [str(ROOT / "pretrain" / f"{script}.py"), *arguments]
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            status: object = 0
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def stage(*arguments: object, ranks: int = 1) -> tuple[object, str, str]:
    return run_world(ranks, entry, [str(a) for a in arguments])[0]


def curriculum(*arguments: object, ranks: int = 1) -> tuple[object, str, str]:
    return run_world(ranks, entry, [str(a) for a in arguments], None, "curriculum")[0]
