"""Compare a picture decoder with a control on the same latents: PSNR, SSIM and text that can still be read.

    python vae/compare_decoders.py --control runs/vae-control --candidate runs/vae --raw PAGES PHOTOGRAPHS

Both read the same encoder's latents of held-out pictures (raw shards). Differences are paired by picture, and their
95 % intervals are bootstrapped over pages and over photographs, whose crops belong together. Writes comparison.json and
comparison.png: originals, controls and candidates of the first pages, enlarged.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from command_line import UserError, progress, run
except ModuleNotFoundError:
    raise SystemExit("not installed: run `make setup`, or `pip install -e . -c constraints.txt`") from None

if TYPE_CHECKING:
    import numpy as np

    from data_pipeline.sample import RawSample
    from vae.autoencoder import VAE

Rows = list[dict[str, str | float]]
SHOWN, WINDOW, ZOOM = 6, 96, 3
"""Pages on the picture, side of what is shown of each in pixels, and its enlargement."""
DOMAINS = {
    "text": ("english", "chinese", "text"),
    "english": ("english",),
    "chinese": ("chinese",),
    "photo": ("photo",),
}
"""What is averaged together; pages in both languages or none are `text` alone."""


@dataclass(frozen=True)
class Config:
    """What to compare on what."""

    control: Path = Path("runs/vae-control")
    """A VAE: its picture decoder is what the candidate has to beat."""
    candidate: Path = Path("runs/vae-image-decoder")
    """A VAE with the same encoder."""
    base: Path | None = None
    """The VAE that the candidate was made from: its encoder and decoder are to be in the candidate, bit for bit."""
    raw: tuple[Path, ...] = ()
    """Folders of raw shards that none of them was trained on."""
    read: int = 100
    """Read the text of the first so many pages with Tesseract."""
    out: Path = Path("runs/vae-comparison")
    dry_run: bool = False
    """Only say what would be compared."""


def main(config: Config) -> None:
    print(f"{config.candidate} minus {config.control} on {', '.join(map(str, config.raw))} -> {config.out}", flush=True)
    if not config.raw:
        raise UserError("--raw needs folders of raw shards that the VAEs were not trained on")
    if config.dry_run:
        return
    from data_pipeline.shards import list_shards, read_raw
    from evaluation.ocr import Tesseract
    from files import write_json
    from vae.autoencoder import VAE

    control, candidate = VAE.from_folder(config.control), VAE.from_folder(config.candidate)
    if control.fingerprint() != candidate.fingerprint():
        raise UserError("the two VAEs have different encoders or latent statistics: their decoders cannot be compared")
    kept = None if config.base is None else keeps(VAE.from_folder(config.base), candidate)
    samples = [s for folder in config.raw for shard in list_shards(folder) for s in read_raw(shard)]
    for page in [s for s in samples if "lines" in s.meta][config.read :]:
        del page.meta["lines"]
    reader = Once(Tesseract()) if config.read else None
    config.out.mkdir(parents=True, exist_ok=True)
    sides = [rows(vae, samples, reader, name) for vae, name in ((control, "control"), (candidate, "candidate"))]
    table = compare(*sides)
    write_json(config.out / "comparison.json", {"kept": kept, "domains": table, "rows": sides})
    draw(config.out / "comparison.png", samples, control, candidate)
    for domain, measures in table.items():
        for measure, (before, after, change) in measures.items():
            ends = "" if change["low"] is None else f" [{change['low']:+.3f}, {change['high']:+.3f}]"
            print(
                f"{domain:<8} {measure:<20} {before['value']:7.3f} -> {after['value']:7.3f}   {change['value']:+.3f}"
                f"{ends}   {change['n']} pictures of {change['prompts']} pages or photographs"
            )
    if kept is not None:
        print(f"encoder and video decoder are those of {config.base}, bit for bit: {kept}")


class Once:
    """A reader of text that reads equal pictures once: both sides ask for the originals."""

    def __init__(self, reader):
        self.reader = reader
        self.readings: dict[tuple, str] = {}

    def read(self, image: "np.ndarray", protocol: str, language: str) -> str:
        key = (image.shape, image.tobytes(), protocol, language)
        if key not in self.readings:
            self.readings[key] = self.reader.read(image, protocol, language)
        return self.readings[key]


def keeps(base: "VAE", candidate: "VAE") -> bool:
    """Whether `candidate` has the encoder of `base` and, as its video decoder, the decoder of `base`, bit for bit."""
    import torch

    if candidate.video_decoder is None:
        return False
    theirs = candidate.state_dict()
    own = ("decoder.", "post_quant_conv.")
    return all(torch.equal(w, theirs[f"video_{n}" if n.startswith(own) else n]) for n, w in base.state_dict().items())


def rows(vae: "VAE", samples: "list[RawSample]", reader, label: str) -> Rows:
    """A row a picture, in order, as `evaluation.vae_suite.reconstruction_rows` makes it."""
    from evaluation.vae_suite import reconstruction_rows

    with progress(len(samples), label, "picture") as bar:

        def counted():
            for sample in samples:
                yield sample
                bar.update()

        return reconstruction_rows(vae, counted(), reader)


def compare(control: Rows, candidate: Rows) -> dict[str, dict[str, list[dict]]]:
    """{domain: {measure: [control, candidate, difference]}}, each a mean with its interval."""
    from evaluation.intervals import Scores, difference, estimate
    from evaluation.report import plain
    from evaluation.vae_suite import MEASURES

    table: dict[str, dict[str, list[dict]]] = {}
    for name, members in DOMAINS.items():
        for measure in MEASURES:
            sides = [[r for r in rows if r["domain"] in members and measure in r] for rows in (control, candidate)]
            if sides[0]:
                a, b = (Scores([r[measure] for r in side], [str(r["cluster"]) for r in side]) for side in sides)
                estimates = (estimate(a), estimate(b), difference(a, b, paired=True))
                table.setdefault(name, {})[measure] = [plain(e) for e in estimates]
    return table


def draw(path: Path, samples: "list[RawSample]", control: "VAE", candidate: "VAE") -> None:
    """The window of each of the first pages that the control gets most wrong: original, control, candidate."""
    import numpy as np
    from PIL import Image

    from data_pipeline.pictures import decode
    from evaluation.vae_suite import domain, reconstruct, worst_window

    pages = [s for s in samples if domain(s) in DOMAINS["text"]][:SHOWN]
    columns = []
    for page in pages:
        image = np.array(decode(page.image))
        drawn = [image, *((reconstruct(vae, image) * 255).round().astype(np.uint8) for vae in (control, candidate))]
        top, left = worst_window(image, drawn[1], WINDOW)
        windows = [p[top : top + WINDOW, left : left + WINDOW] for p in drawn]
        columns.append(np.concatenate([enlarged(w) for w in windows], axis=0))
    if columns:
        Image.fromarray(np.concatenate(columns, axis=1)).save(path)


def enlarged(window: "np.ndarray") -> "np.ndarray":
    """A window, filled up with white to its full size, enlarged pixel by pixel, with a border."""
    import numpy as np

    square = np.full((WINDOW + 2, WINDOW + 2, 3), 255, np.uint8)
    square[: window.shape[0], : window.shape[1]] = window
    return square.repeat(ZOOM, 0).repeat(ZOOM, 1)


if __name__ == "__main__":
    run(main, Config)
