"""What a VAE loses: pictures against their reconstructions, by domain (Qwen-Image report, section 5.2.1).

PSNR and SSIM are of fp32 reconstructions, before rounding to bytes. Text is read in the original and in the
reconstruction, and both readings are scored against the text that was drawn, so the original is the ceiling.
"""

import base64
import html
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from data_pipeline.pictures import decode
from data_pipeline.sample import RawSample
from evaluation.intervals import Estimate, Scores, estimate
from evaluation.ocr import score_text

if TYPE_CHECKING:
    from vae.autoencoder import VAE

Row = dict[str, str | float]
LANGUAGES = {"english": "en", "chinese": "zh"}
MEASURES = ("psnr", "ssim", "text_original", "text_reconstruction")
SHOWN, ZOOM, WINDOW = 24, 4, 48
"""Pictures on the page, enlargement of their crops, side of the crops in pixels."""


class Reader(Protocol):
    """`evaluation.ocr.Tesseract`, or anything that reads a uint8 [h, w, 3] picture."""

    def read(self, image: np.ndarray, protocol: str, language: str) -> str: ...


def reconstruction_rows(
    vae: "VAE", samples: Iterable[RawSample], reader: Reader | None = None, page: Path | None = None
) -> list[Row]:
    """One row a picture: key, domain, cluster, psnr (dB), ssim and, for text with a reader, both text accuracies.

    Domains are photo, english, chinese, and the sample's source for the rest. Crops of one photograph are one cluster.
    `page` gets the first pictures side by side with their reconstructions, with a crop enlarged.
    """
    rows, shown = [], []
    for sample in samples:
        image = np.array(decode(sample.image))
        y = reconstruct(vae, image)
        x = image.astype(np.float32) / 255
        row: Row = {"key": sample.key, "domain": domain(sample), "cluster": str(sample.meta.get("photo", sample.key))}
        row |= {"psnr": psnr(x, y), "ssim": ssim(x, y)}
        drawn = (y * 255).round().astype(np.uint8)
        language = LANGUAGES.get(str(row["domain"]))
        if reader is not None and language is not None and sample.meta.get("lines"):
            wanted = {"protocol": "long", "language": language, "text": [line["text"] for line in sample.meta["lines"]]}
            for name, picture in (("text_original", image), ("text_reconstruction", drawn)):
                row[name] = score_text(reader.read(picture, "long", language), wanted)["accuracy"]
        rows.append(row)
        if page is not None and len(shown) < SHOWN:
            shown.append((row, image, drawn))
    if not rows:
        raise ValueError("no pictures to reconstruct")
    if page is not None:
        page.write_text(comparison(shown), encoding="utf-8")
    return rows


def summary(rows: list[Row]) -> dict[str, dict[str, Estimate]]:
    """{domain: {measure: mean with its interval over clusters}}."""
    table: dict[str, dict[str, Estimate]] = {}
    for name in sorted({str(r["domain"]) for r in rows}):
        of = [r for r in rows if r["domain"] == name]
        for measure in MEASURES:
            having = [r for r in of if measure in r]
            if having:
                scores = Scores([r[measure] for r in having], [str(r["cluster"]) for r in having])
                table.setdefault(name, {})[measure] = estimate(scores)
    return table


def domain(sample: RawSample) -> str:
    """photo, english, chinese, or the sample's source."""
    language = sample.meta.get("language")
    return language if language in LANGUAGES else str(sample.meta.get("source", "other"))


def reconstruct(vae: "VAE", image: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] -> its reconstruction, fp32 in [0, 1], of the same size.

    ValueError for a VAE that works in tiles: their seams would be scored.
    """
    if vae.tiles is not None:
        raise ValueError("pictures are not scored in tiles, whose seams would count: set vae.tiles to None")
    device = next(vae.parameters()).device
    pixels = torch.from_numpy(image).to(device).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    y = vae.decode_latent(vae.encode_latent(pixels), size=(1, *image.shape[:2]))
    return (y[0, :, 0].permute(1, 2, 0).cpu().numpy() + 1) / 2


def psnr(x: np.ndarray, y: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]; equal pictures count as 100."""
    mse = float(np.mean((x.astype(np.float64) - y) ** 2))
    return min(100.0, -10 * math.log10(mse)) if mse > 0 else 100.0


def ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004: Gaussian window, sigma 1.5) of pictures [h, w, 3] in [0, 1]."""
    from skimage.metrics import structural_similarity

    gaussian = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    return float(structural_similarity(x, y.astype(np.float32), channel_axis=2, data_range=1.0, **gaussian))


def comparison(shown: list[tuple[Row, np.ndarray, np.ndarray]]) -> str:
    """A page of originals, reconstructions and, of both, the crop that differs most, enlarged."""
    parts = ["<!doctype html><meta charset=utf-8><title>Reconstructions</title>"]
    parts.append("<style>body{font:14px sans-serif}img{image-rendering:pixelated;margin:2px}</style>")
    for row, x, y in shown:
        top, left = worst_window(x, y)
        crops = [p[top : top + WINDOW, left : left + WINDOW].repeat(ZOOM, 0).repeat(ZOOM, 1) for p in (x, y)]
        title = f"{row['key']} · {row['domain']} · {row['psnr']:.2f} dB · SSIM {row['ssim']:.4f}"
        images = "".join(f'<img src="data:image/png;base64,{png(p)}">' for p in (x, y, *crops))
        parts.append(f"<h4>{html.escape(title)}</h4>{images}")
    return "\n".join(parts)


def worst_window(x: np.ndarray, y: np.ndarray, side: int = WINDOW) -> tuple[int, int]:
    """Top and left of the window of `side` pixels whose squared error is largest."""
    error = ((x.astype(np.float64) - y) ** 2).sum(-1)
    spots = [(t, s) for t in range(0, max(1, len(x) - side), 8) for s in range(0, max(1, x.shape[1] - side), 8)]
    return max(spots, key=lambda p: error[p[0] : p[0] + side, p[1] : p[1] + side].sum())


def png(image: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
