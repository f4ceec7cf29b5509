"""The demo's page: data, reconstructions, curves, and the same prompts drawn after every stage and by the base.

It shows what is there, so it can be made at any moment of a line. Prompts and seeds are fixed, never chosen by eye.
"""

import hashlib
import json
import random
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from command_line import UserError, run
    from training.curves import plot, png_address, read_rows
    from training.start import RunConfig
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

if TYPE_CHECKING:
    from PIL.Image import Image

    from data_pipeline.sample import RawSample

MODELS = ["pretrain-256", "pretrain-640", "sft", "dpo", "grpo"]
TRAINED = ["vae", "image-decoder", *MODELS]
PURPOSES = {
    "pretrain-256": "From random weights, on small pictures, which are cheap. Here the model learns what words mean "
    "and where things go.",
    "pretrain-640": "Larger pictures, from the weights before. What is new is how much a token shows, and detail.",
    "sft": "The same loss on chosen data. It moves the model towards the pictures that one wants.",
    "dpo": "Pairs of its own pictures, of which a reward prefers one. The better becomes likelier, against the worse.",
    "grpo": "Groups of its own pictures, compared by a reward. It learns from its own mistakes, which no data shows.",
}
"""What each stage is for."""
PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
LARGEST_PX = 512
"""Side to which larger pictures are shrunk before the page makes small ones of them."""
BASE_SHEETS = {"as shipped": "base-64px.png", "after Flow-GRPO": "base-grpo-64px.png"}
"""Of the base, made once (base/README.md says how): the first 64 validation prompts."""


@dataclass(frozen=True)
class Config:
    line: Path = Path("runs/quick")
    """Folder of the line."""
    steps: int = 12
    """Denoising steps a picture."""
    cfg_scale: float = 3.0
    captions: int = 4
    """Training captions drawn from every stage."""
    held_out: int = 5
    """Validation prompts of the shapes world drawn beside them, if the data are ours."""


class RawSamples:
    """The samples of a folder of raw shards; only those that are shown are read."""

    def __init__(self, folder: Path):
        from data_pipeline.shards import list_shards
        from data_pipeline.tar_index import tar_index

        self._places = [(s, entry) for s in list_shards(folder) for entry in tar_index(s).entries]

    def spread(self, count: int, edits: bool = True) -> "Iterator[RawSample]":
        """`count` of them at random, the same ones each time, with or without edits; broken ones are left out."""
        from data_pipeline.shards import raw_sample

        places = [(s, entry) for s, entry in self._places if edits or "reference.0.png" not in entry.members]
        for shard, entry in random.Random(0).sample(places, min(count, len(places))):
            with suppress(ValueError):
                yield raw_sample(shard, entry)

    def captions(self, count: int) -> list[str]:
        """Captions of `count` of them, but of edits, which need a picture."""
        return [sample.meta["caption"] for sample in self.spread(count, edits=False)]

    def pictures(self, count: int) -> "list[Image]":
        """Pictures of `count` of them, large ones shrunk. UserError if none can be decoded."""
        from data_pipeline.pictures import decode

        found = []
        for sample in self.spread(count):
            with suppress(ValueError):
                found.append(decode(sample.image))
                found[-1].thumbnail((LARGEST_PX, LARGEST_PX))
        if not found:
            raise UserError("none of the pictures can be decoded")
        return found

    def sheet(self, count: int) -> "Image":
        """So many of the pictures."""
        from data_pipeline.page import contact_sheet

        return contact_sheet(self.pictures(count), 12, 96)


def ours(line: Path) -> bool:
    """Whether the line draws its pictures itself."""
    return (line / "data" / "raw" / "synthesis.json").exists()


def reconstructions(line: Path, samples: RawSamples, count: int = 8, side: int = 144):
    """Rows: originals, image decoder, video decoder; or None before a VAE is there."""
    folder = next((line / f for f in ("image-decoder", "vae", "components") if (line / f / "vae").is_dir()), None)
    if folder is None:
        return None
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    from data_pipeline.page import contact_sheet
    from vae.autoencoder import VAE

    vae = VAE.from_folder(folder)
    originals = [ImageOps.fit(picture, (side, side)) for picture in samples.pictures(count)]
    pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 127.5 - 1 for p in originals])
    rows, names = [originals], ["original"]
    decoders = ["image", "video"] if (folder / "vae_video").is_dir() else ["image"]
    with torch.no_grad():
        latent = vae.encode_latent(pixels[:, :, None])
        for name in decoders:
            out = vae.decode_latent(latent, decoder=name)[:, :, 0].clamp(-1, 1)
            rows.append([Image.fromarray(((x.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()) for x in out])
            names.append(f"{name} decoder, {10 * (4 / ((pixels - out) ** 2).mean()).log10():.1f} dB")
    return contact_sheet([p for row in rows for p in row], len(originals), side), names


def curves(line: Path) -> bytes | None:
    """One small plot a run: its loss (or reward) over steps; None before any run has logged."""
    found = {}
    for name in TRAINED:
        rows = read_rows(line / name / "metrics.jsonl")
        metric = "reward" if any("reward" in r for r in rows) else "loss"
        if points := [(r["step"], r[metric]) for r in rows if metric in r]:
            found[f"{name}: {metric}"] = points
    return plot(found) if found else None


def drawings(config: Config):
    """(rows of PIL pictures, one row a model; model names; prompts; how many of these were trained on), or None before
    a model is there."""
    runs = {name: config.line / name for name in MODELS}
    models = [name for name, run in runs.items() if any((run / "checkpoints").glob("step_*"))]
    if not models:
        return None
    from PIL import Image

    from evaluation.prompts import shapes_prompts
    from model.sampling.draw import Sampler
    from model.sampling.schedule import FixedSchedule
    from training.engine.checkpoint import read_weights
    from training.loading import load
    from training.source import look

    prompts = RawSamples(config.line / "data" / "curated").captions(config.captions)
    captions = len(prompts)
    if ours(config.line):
        prompts += [p.text for p in shapes_prompts("validation")[: config.held_out]]
    if not prompts:  # edits alone
        return None
    seeds = list(range(len(prompts)))
    painter = load(runs[models[0]], sampler=Sampler(FixedSchedule(config.steps), cfg_scale=config.cfg_scale))
    rows = []
    for name in models:
        painter.velocity.load_state_dict(read_weights(runs[name])[1])
        side = look(runs[name]).side_px()
        images = painter.generate(prompts, [(side, side)] * len(prompts), seeds)
        rows.append([Image.fromarray(image) for image in images])
    return rows, models, prompts, captions


def base_drawings(steps: int, cfg_scale: float, count: int):
    """(PIL pictures by the shipped base, their validation prompts)."""
    from PIL import Image

    from evaluation.prompts import shapes_prompts
    from model.sampling.draw import Sampler
    from model.sampling.schedule import FixedSchedule
    from training.loading import load
    from training.source import BASE, look

    prompts, side = [p.text for p in shapes_prompts("validation")[:count]], look(BASE).side_px()
    painter = load(BASE, sampler=Sampler(FixedSchedule(steps), cfg_scale=cfg_scale))
    images = painter.generate(prompts, [(side, side)] * count, list(range(count)))
    return [Image.fromarray(image) for image in images], prompts


def base_sheets() -> list[tuple[str, str, str]]:
    """(what, address, sha256) of the committed pictures of the base."""
    found = []
    for what, name in BASE_SHEETS.items():
        png = (PICTURES / name).read_bytes()
        found.append((what, png_address(png), hashlib.sha256(png).hexdigest()))
    return found


def stage_table(line: Path) -> list[tuple[str, str, str, str]]:
    """(stage, seconds, last logged loss or reward, last validation) of every finished stage."""
    rows = []
    for marker in sorted((line / "finished").glob("*.json"), key=lambda p: p.stat().st_mtime):
        last = (read_rows(line / marker.stem / "metrics.jsonl") or [{}])[-1]
        shown = ", ".join(f"{k} {last[k]:.4g}" for k in ("loss", "reward") if k in last)
        judged = [
            f"{v['strict']:.2f} [{v['strict_low']:.2f}, {v['strict_high']:.2f}] over {v['strict_floor']:.2f}; "
            f"GenEval's rule {v['official']:.2f} over {v['official_floor']:.2f}; reward {v['reward']:.2f}; "
            f"guidance {guidance(line / marker.stem):g}"
            for v in read_rows(line / marker.stem / "validation.jsonl")[-1:]
            if "strict" in v
        ]
        seconds = json.loads(marker.read_text())["seconds"]
        rows.append((marker.stem, f"{seconds:.0f}", shown, "".join(judged)))
    return rows


def guidance(run: Path) -> float:
    """That of a run's validation."""
    return tomllib.loads((run / "config.toml").read_text()).get("cfg_scale", RunConfig.GUIDANCE)


def verdicts(line: Path) -> dict[str, Path]:
    """The newest evaluation's folder of every model that was judged on test prompts."""
    found = {}
    for name in MODELS:
        if files := list((line / "judged").glob(f"*{name}-{'[0-9a-f]' * 8}-*/scores.json")):  # of other recipes, too
            found[name] = max(files, key=lambda f: f.stat().st_mtime).parent
    return found


def judged(line: Path) -> dict[str, dict]:
    """Of every model that was judged on test prompts: each rule's value with its interval, by kind of prompt too, and
    the same for true pictures through the VAE (ceiling) and the best constant picture (constant)."""
    found = {}
    for name, folder in verdicts(line).items():
        suite = json.loads((folder / "scores.json").read_text())["suites"]["shapes/test-iid"]
        found[name] = {rule: suite["scores"][rule] for rule in ("strict", "official")}
    return found


def metrics(line: Path) -> dict[str, dict]:
    """What the line reached, and no times: two runs of one recipe and seed write the same."""
    last = {name: read_rows(line / name / "validation.jsonl")[-1:] for name in MODELS}
    return {"test": judged(line), "validation": {name: rows[0] for name, rows in last.items() if rows}}


def main(config: Config) -> None:
    if not (config.line / "data" / "raw").is_dir():
        raise UserError(f"{config.line} holds no line yet; run `make quick` first")
    import jinja2

    from data_pipeline.page import contact_sheet
    from demo.pictures import data_uri, stack
    from files import atomic_file, write_json

    samples, folder = RawSamples(config.line / "data" / "raw"), config.line / "report"
    folder.mkdir(parents=True, exist_ok=True)
    sheets = [samples.sheet(24)]
    page = {"stages": stage_table(config.line), "name": config.line.name, "config": config, "purposes": PURPOSES}
    page |= {"judged": judged(config.line), "ours": ours(config.line)}
    page["sheets"] = {
        n: png_address((f / "shapes-test-iid.png").read_bytes()) for n, f in verdicts(config.line).items()
    }
    write_json(folder / "metrics.json", metrics(config.line))
    page["data"] = data_uri(samples.sheet(48))
    if found := reconstructions(config.line, samples):
        picture, page["reconstruction_rows"] = found
        page["reconstructions"] = data_uri(picture)
        sheets.append(picture)
    if plot := curves(config.line):
        page["curves"] = data_uri(plot)
    if drawn := drawings(config):
        rows, page["models"], page["prompts"], page["captions"] = drawn
        page["drawings"] = [[data_uri(picture) for picture in row] for row in rows]
        sheets.append(contact_sheet([p for row in rows for p in row], len(rows[0]), 128))
    pictures, prompts = base_drawings(20, config.cfg_scale, 8)
    page["base"] = list(zip([data_uri(p) for p in pictures], prompts, strict=True))
    page["base_sheets"] = base_sheets()
    sheets.append(contact_sheet(pictures, len(pictures), 128))
    stack(sheets).save(folder / "overview.png")
    compared = folder / "compare.json"
    page["compare"] = json.loads(compared.read_text()) if compared.exists() else None
    template = jinja2.Template((Path(__file__).parent / "report.html").read_text(), autoescape=True)
    with atomic_file(folder / "index.html") as file:
        file.write(template.render(page).encode())
    print(f"wrote {folder / 'index.html'}")


if __name__ == "__main__":
    run(main, Config)
