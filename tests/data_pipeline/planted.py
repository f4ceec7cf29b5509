"""Photographs with planted defects: what filters must catch, made without any of their code."""

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import skimage
import skimage.draw
import skimage.filters
import skimage.transform
import sklearn
from PIL import Image, ImageEnhance, ImageFilter

from data_pipeline.synthesis.fonts import font_folders

COLOUR = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "china.jpg", "flower.jpg")
GREY = ("camera.png", "coins.png", "brick.png", "grass.png", "gravel.png")
Pixels = np.ndarray
Planter = Callable[[Pixels, np.random.Generator], Pixels]


@cache
def photographs() -> dict[str, Pixels]:
    """Name -> uint8 [h, w, 3], the photographs that installed packages bring."""
    sklearn_images = Path(sklearn.__file__).parent / "datasets" / "images"
    skimage_images = Path(skimage.__file__).parent / "data"
    hopper = Path(matplotlib.__file__).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"
    files = {n: (sklearn_images if (sklearn_images / n).exists() else skimage_images) / n for n in COLOUR + GREY}
    files["grace_hopper.jpg"] = hopper
    return {name: np.asarray(Image.open(path).convert("RGB")) for name, path in files.items()}


def crops(n: int, seed: int, names: tuple[str, ...] | None = None) -> list[Pixels]:
    """`n` crops of at least 55 % of the sides, from the photographs in turn."""
    rng = np.random.default_rng(seed)
    photos = [photographs()[name] for name in names or photographs()]
    found = []
    for i in range(n):
        height, width, _ = photos[i % len(photos)].shape
        h, w = int(height * rng.uniform(0.55, 1)), int(width * rng.uniform(0.55, 1))
        y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        found.append(photos[i % len(photos)][y : y + h, x : x + w])
    return found


def apart(n_each: int, seed: int, names: tuple[str, ...] | None = None) -> list[Pixels]:
    """Crops of each photograph, of which no two share more than half of the smaller one."""
    rng = np.random.default_rng(seed)
    found = []
    for photo in [photographs()[name] for name in names or photographs()]:
        height, width, _ = photo.shape
        boxes: list[tuple[int, int, int, int]] = []
        while len(boxes) < n_each:
            h, w = int(height * rng.uniform(0.3, 0.45)), int(width * rng.uniform(0.3, 0.45))
            y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            shared = [
                max(0, min(y + h, b + d) - max(y, b)) * max(0, min(x + w, a + c) - max(x, a)) / min(h * w, c * d)
                for a, b, c, d in boxes
            ]
            if max(shared, default=0) <= 0.5:
                boxes.append((x, y, w, h))
        found += [photo[y : y + h, x : x + w] for x, y, w, h in boxes]
    return found


def jpeg(pixels: Pixels, quality: int = 92, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=int(quality), **options)
    return file.getvalue()


def as_float(function: Callable[[np.ndarray], np.ndarray]) -> Planter:
    """Work on floats in [0, 1]."""
    return lambda pixels, rng: (np.clip(function(pixels / 255.0, rng), 0, 1) * 255).round().astype(np.uint8)


def motion_blur(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    length = int(rng.integers(17, 32))
    kernel = np.zeros((length, length))
    kernel[length // 2] = 1
    kernel = skimage.transform.rotate(kernel, rng.uniform(0, 180))
    from scipy.ndimage import convolve

    return np.stack([convolve(pixels[..., c], kernel / kernel.sum(), mode="nearest") for c in range(3)], axis=2)


def enlarged(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    image, factor = Image.fromarray(pixels), rng.uniform(5, 9)
    small = image.resize((round(image.width / factor), round(image.height / factor)), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.BICUBIC))


def vivid(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    hue, saturation, value = Image.fromarray(pixels).convert("HSV").split()
    least = int(rng.integers(246, 256))
    return np.asarray(Image.merge("HSV", (hue, saturation.point(lambda s: max(s, least)), value)).convert("RGB"))


def blank(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return np.clip(rng.integers(10, 246, 3) + rng.normal(0, rng.uniform(0, 1), pixels.shape), 0, 255).astype(np.uint8)


def gradient(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    height, width, _ = pixels.shape
    a, b = rng.integers(0, 256, (2, 3))
    along = np.linspace(0, 1, width)[None, :, None] if rng.random() < 0.5 else np.linspace(0, 1, height)[:, None, None]
    return np.broadcast_to(a + (b - a) * along, pixels.shape).round().astype(np.uint8)


def logo(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    page = np.full_like(pixels, rng.integers(150, 256))
    height, width, _ = page.shape
    rows, columns = skimage.draw.ellipse(height / 2, width / 2, *rng.uniform(0.06, 0.16, 2) * min(height, width))
    page[rows, columns] = rng.integers(0, 256, 3)
    return page


def noise(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return rng.integers(0, 256, (*pixels.shape[:2], 3 if rng.random() < 0.5 else 1), dtype=np.uint8) * np.ones(
        3, np.uint8
    )


def grain(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return np.clip(pixels + rng.normal(0, rng.uniform(50, 90), pixels.shape), 0, 255).astype(np.uint8)


def pepper(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    hit = rng.random(pixels.shape[:2]) < rng.uniform(0.2, 0.5)
    return np.where(hit[..., None], rng.integers(0, 2, (*pixels.shape[:2], 1)) * 255, pixels).astype(np.uint8)


def halftone(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return (
        (pixels.mean(axis=2, keepdims=True) > rng.integers(0, 256, (*pixels.shape[:2], 1))) * np.full(3, 255)
    ).astype(np.uint8)


def rings(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    wave = 127.5 + 127.5 * np.sin((x**2 + y**2) / rng.uniform(40, 200))
    return (wave[..., None] * np.ones(3)).astype(np.uint8)


BLUR: tuple[Planter, ...] = (
    lambda p, rng: np.asarray(Image.fromarray(p).filter(ImageFilter.GaussianBlur(rng.uniform(2.5, 6)))),
    as_float(motion_blur),
    enlarged,
)
EXPOSURE: tuple[Planter, ...] = (
    as_float(lambda x, rng: x * rng.uniform(0.03, 0.14)),
    as_float(lambda x, rng: 1 - (1 - x) * rng.uniform(0.03, 0.14)),
)
COLOURS: tuple[Planter, ...] = (
    vivid,
    lambda p, rng: np.asarray(ImageEnhance.Color(Image.fromarray(vivid(p, rng))).enhance(rng.uniform(1, 3))),
)
EMPTY: tuple[Planter, ...] = (blank, gradient, logo)
NOISE: tuple[Planter, ...] = (noise, grain, pepper, halftone, rings)


def resized(pixels: Pixels, width: float, height: float) -> Pixels:
    image = Image.fromarray(pixels)
    return np.asarray(
        image.resize((round(image.width * width), round(image.height * height)), Image.Resampling.LANCZOS)
    )


def recompressed(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(jpeg(pixels, rng.integers(20, 90)))))


def rescaled(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    both = rng.uniform(0.4, 1.6)
    return resized(pixels, both * rng.uniform(0.95, 1.05), both)


def cut(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    height, width, _ = pixels.shape
    left, top, right, bottom = rng.uniform(0, 0.08, 4)
    return pixels[int(top * height) : int((1 - bottom) * height), int(left * width) : int((1 - right) * width)]


def brightened(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return np.clip(pixels * rng.uniform(0.85, 1.15) + rng.uniform(-10, 10), 0, 255).astype(np.uint8)


COPIES: tuple[Planter, ...] = (
    recompressed,
    rescaled,
    cut,
    brightened,
    lambda p, rng: recompressed(rescaled(cut(p, rng), rng), rng),
)


def pasted(pixels: Pixels, patch: Pixels, rng: np.random.Generator) -> Pixels:
    """The patch somewhere in the picture."""
    height, width, _ = patch.shape
    y, x = (int(rng.integers(0, a - b + 1)) for a, b in zip(pixels.shape, patch.shape[:2], strict=False))
    found = pixels.copy()
    found[y : y + height, x : x + width] = patch
    return found


def with_qr_code(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    import cv2

    code = cv2.QRCodeEncoder.create().encode(f"https://shop.example/{rng.integers(1 << 40)}")
    code = np.kron(np.pad(code, 2, constant_values=255), np.ones((3, 3), np.uint8))
    return pasted(pixels, np.repeat(code[..., None], 3, axis=2), rng)


EAN_LEFT = (
    "0001101",
    "0011001",
    "0010011",
    "0111101",
    "0100011",
    "0110001",
    "0101111",
    "0111011",
    "0110111",
    "0001011",
)
EAN_PARITY = ("LLLLLL", "LLGLGG", "LLGGLG", "LLGGGL", "LGLLGG", "LGGLLG", "LGGGLL", "LGLGLG", "LGLGGL", "LGGLGL")


def with_barcode(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """An EAN-13 code, bars of 2 pixels."""
    digits = [int(d) for d in rng.integers(0, 10, 12)]
    digits.append(-sum(d * (3 if i % 2 else 1) for i, d in enumerate(digits)) % 10)
    right = ["".join("10"[int(b)] for b in EAN_LEFT[d]) for d in digits[7:]]
    left = [
        EAN_LEFT[d] if parity == "L" else "".join("10"[int(b)] for b in reversed(EAN_LEFT[d]))
        for d, parity in zip(digits[1:7], EAN_PARITY[digits[0]], strict=True)
    ]
    bars = "0" * 9 + "101" + "".join(left) + "01010" + "".join(right) + "101" + "0" * 9
    row = np.kron([0 if b == "1" else 255 for b in bars], np.ones(2)).astype(np.uint8)
    return pasted(pixels, np.repeat(np.repeat(row[None, :, None], 80, axis=0), 3, axis=2), rng)


def framed(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Letterboxed or in a frame."""
    height, width, _ = pixels.shape
    share, colour = rng.uniform(0.07, 0.2), rng.choice([0, 255, int(rng.integers(256))])
    y, x = [(share, 0.0), (0.0, share), (share, share)][int(rng.integers(3))]
    page = np.full((round(height * (1 + 2 * y)), round(width * (1 + 2 * x)), 3), colour, np.uint8)
    top, left = round(height * y), round(width * x)
    page[top : top + height, left : left + width] = pixels
    return page


def han_font() -> Path:
    """A font with Chinese characters; skips the test where it is not installed."""
    found = sorted(file for folder in font_folders() for file in folder.rglob("wqy-microhei*"))
    if not found:
        pytest.skip("no Chinese font: install fonts-wqy-microhei")
    return found[0]
