"""Catch and false drop of each filter on draws that no threshold was chosen on; `pytest -m slow -s` prints the table.

Other crops, other defects, other type and other captions than in test_filters.py, test_marks.py and
test_text_filters.py, which the thresholds were measured with. `unseen` are photographs that those don't use at all.
"""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import planted
import pytest
import skimage
from PIL import Image, ImageDraw, ImageFont
from test_filters import dropped, view
from test_marks import LARGE

from data_pipeline.filters.duplicates import find_duplicates, thumbnail
from data_pipeline.filters.table import LABELS
from data_pipeline.filters.view import View

pytestmark = pytest.mark.machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
N = 130
UNSEEN = ("ihc.png", "retina.jpg", "motorcycle_right.png", "moon.png")
SERIF = Path(matplotlib.__file__).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSerif.ttf"
WORDS = "valley lantern harbour copper thunder meadow ticket engine orchard velvet compass ladder".split()
HAN = "床前明月光疑是地上霜举头望低思故乡千里江陵一日还两岸青山相对出孤帆片远影碧空尽"


def report(name: str, caught: list[bool], wrong: list[bool]) -> None:
    shares = (f"{len(some)} | {100 * np.mean(some):.1f} %" for some in (caught, wrong))
    print(f"| {name} | {' | '.join(shares)} |")
    assert len(caught) >= 100 and len(wrong) >= 100
    assert np.mean(caught) >= 0.95, f"{name} caught {np.mean(caught):.3f}"
    assert np.mean(wrong) <= 0.03, f"{name} wrongly dropped {np.mean(wrong):.3f}"


def views(pictures: list[np.ndarray], seed: int) -> list[View]:
    rng = np.random.default_rng(seed)
    return [view(planted.jpeg(p, rng.integers(80, 96))) for p in pictures]


@cache
def good() -> list[View]:
    return views(planted.crops(N, seed=1001), 1002)


def bad(planters: tuple[planted.Planter, ...], names: tuple[str, ...] | None = None) -> list[View]:
    rng = np.random.default_rng(1003)
    pictures = planted.crops(N, seed=1004, names=names)
    return views([planters[i % len(planters)](p, rng) for i, p in enumerate(pictures)], 1005)


@pytest.mark.parametrize(
    ("name", "planters", "names"),
    [
        ("clarity", planted.BLUR, None),
        ("luma", planted.EXPOSURE, None),
        ("saturation", planted.COLOURS, planted.COLOUR),
        ("entropy", planted.EMPTY, None),
        ("texture", planted.NOISE, None),
        ("qr_code", (planted.with_qr_code,), LARGE),
        ("barcode", (planted.with_barcode,), LARGE),
        ("frame", (planted.framed,), LARGE),
    ],
)
def test_pictures(name: str, planters: tuple, names: tuple[str, ...] | None):
    report(name, dropped(name, bad(planters, names)), dropped(name, good()))


@pytest.mark.parametrize("name", ["clarity", "luma", "saturation", "entropy", "texture", "frame"])
def test_unseen_photographs_are_kept(name: str):
    """Printed, not asserted: four photographs of science and a workshop are no sample of photographs."""
    rng = np.random.default_rng(1006)
    folder = Path(skimage.__file__).parent / "data"
    photos = [np.asarray(Image.open(folder / n).convert("RGB")) for n in UNSEEN]
    pictures = []
    for i in range(N):
        height, width, _ = photos[i % len(photos)].shape
        h, w = (int(side * rng.uniform(0.55, 1)) for side in (height, width))
        y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        pictures.append(photos[i % len(photos)][y : y + h, x : x + w])
    wrong = dropped(name, views(pictures, 1007))
    by_photo = {n: f"{100 * np.mean(wrong[i :: len(UNSEEN)]):.0f} %" for i, n in enumerate(UNSEEN)}
    print(f"unseen, {name}: {100 * np.mean(wrong):.1f} % of {N} dropped, {by_photo}")


def test_files():
    rng = np.random.default_rng(1008)
    whole = [planted.jpeg(p) for p in planted.crops(N, seed=1009)]
    broken = [
        (data[: int(rng.integers(2, len(data) - 2000))], rng.bytes(3000), b"", data[:2] + bytes(900) + data[902:])[
            i % 4
        ]
        for i, data in enumerate(whole)
    ]
    report("broken", dropped("broken", [view(d) for d in broken]), dropped("broken", good()))
    crushed = [view(planted.jpeg(p, rng.integers(1, 5))) for p in planted.crops(N, seed=1010)]
    report("file_size", dropped("file_size", crushed), dropped("file_size", good()))
    sizes: dict[str, tuple[list[View], list[View]]] = {"resolution": ([], []), "aspect_ratio": ([], [])}
    photos = list(planted.photographs().values())
    for i in range(N):
        photo = photos[i % len(photos)]
        to = lambda w, h, p=photo: view(planted.jpeg(planted.resized(p, w / p.shape[1], h / p.shape[0])))  # noqa: E731
        sizes["resolution"][0].append(to(int(rng.integers(16, 256)), int(rng.integers(256, 1000))))
        sizes["resolution"][1].append(to(*(int(n) for n in rng.integers(256, 1000, 2))))
        height = int(rng.integers(40, 120))
        sizes["aspect_ratio"][0].append(to(int(height * rng.uniform(3.3, 6)), height))
        sizes["aspect_ratio"][1].append(to(int(height * rng.uniform(1, 3.1)), height))
    for name, (wrong, right) in sizes.items():
        report(name, dropped(name, wrong), dropped(name, right))

    def turned(i: int, orientation: int) -> View:
        exif = Image.Exif()
        exif[0x0112] = orientation
        return view(planted.jpeg(planted.crops(1, seed=2000 + i)[0], exif=exif))

    upright = [turned(i, 1 + i % 2) for i in range(N)]
    report("rotation", dropped("rotation", [turned(i, 3 + i % 6) for i in range(N)]), dropped("rotation", upright))


def test_duplicates():
    rng = np.random.default_rng(1011)
    originals = planted.apart(9, 1012)
    n = len(originals)
    copies = [planted.COPIES[i % len(planted.COPIES)](p, rng) for i, p in enumerate(originals)]
    order = rng.permutation(2 * n)
    found = find_duplicates(np.stack([thumbnail(view(planted.jpeg((originals + copies)[i]))) for i in order]))
    repeats = {int(order[i]): int(order[j]) for i, j in found.items()}
    right = {a % n for a, b in repeats.items() if a % n == b % n}
    report(
        "duplicate", [i in right for i in range(n)], [i in repeats and repeats[i] % n != i % n for i in range(2 * n)]
    )


GOOD_CAPTIONS = [
    "Three boats at anchor in a quiet harbour", "an old map of Vienna", "雪后的长城", "两位老人在公园下棋",
    "Close-up of a bee on a thistle, shallow depth of field", 'Poster with the words "HANDS OFF!"', "夏祭りの夜",
    "Ein Hund läuft durch den Wald", "Receipt no. 4711 from a bakery", "un marché aux fleurs à Nice",
    "A street sign reading “Rue de l'Église”", "Logo: a fox inside a circle", "View from the 102nd floor", "red on red",
    "the long and winding road that leads over the hill and into the next valley", "Photograph of a photograph",
    "A slide titled Q3 results, revenue up 12 %", "Сад весной", "black-and-white portrait, 1920s", "No. 5",
    "menu: soup, bread, fish & chips", 'A mug that says "Sorry, I can\'t adult today"', "Um gato dorme no sofá, Belém",
    'Business card with "info@lopez.example" and "www.lopez.example"', "春联写着“对不起，我不能走”", "Irmãos à mesa",
    "A T-shirt printed with “404: page not found &nbsp;”", "Plakat mit «ÜBER DEN DÄCHERN»", "ação e reação, cartaz",
    'Screen with the line "{{ user }}" in green', "Ao pôr do sol, crianças jogam futebol no chão de terra",
]  # fmt: skip
BAD_CAPTIONS = [
    "PXL_20230101.jpg", "screenshot 12", "Untitled-3", "NaN", "none", "undefined", "DSCN0421.JPG", "picture.png",
    "I cannot help with identifying people in this image.", "I'm unable to view the picture",
    "As an AI assistant I do not have eyes", "I can't describe it, sorry", "对不起，图片无法查看", "无法描述该图片",
    "作为人工智能我不能", "see http://pics.example/a?id=3", "www.stock.example has it", "<div class=x>dog</div>",
    "fish &nbsp; chips", "<br/>a dog", "Ã¼ber den Wolken", "donâ€™t walk", "dogs \ufffd cats", "{{caption}}",
    "dog dog dog dog", "blue sea blue sea blue sea blue sea blue sea",
    "nice photo nice photo nice photo nice photo nice", "hello%20world%21",
]  # fmt: skip


def test_captions():
    kept = [view(b"", end.format(c)) for c in GOOD_CAPTIONS for end in ("{}", "{}.", "{} at noon", " {}", "{}, 1987")]
    wrong = [view(b"", end.format(c)) for c in BAD_CAPTIONS for end in ("{}", " {}", "{}\n", "\t{} ")]
    report("invalid_caption", dropped("invalid_caption", wrong), dropped("invalid_caption", kept))


@cache
def backgrounds() -> list[np.ndarray]:
    """Photographs without writing (the portraits show small name badges, which the filters rightly find)."""
    names = ("china.jpg", "flower.jpg", "rocket.jpg", "coffee.png", "chelsea.png")
    return [planted.resized(p, 420 / p.shape[1], 300 / p.shape[0]) for p in planted.crops(25, seed=1013, names=names)]


def written(i: int, text: str, size: int, patch: bool = True) -> View:
    """Text on a photograph, black on a plain light patch or white on the picture."""
    rng = np.random.default_rng(5000 + i)
    page = Image.fromarray(backgrounds()[i % 25])
    font = ImageFont.truetype(str(SERIF if text.isascii() or "©" in text else planted.han_font()), size)
    x1, y1 = font.getbbox(text)[2:]
    x, y = int(rng.integers(10, max(11, 405 - x1))), int(rng.integers(10, max(11, 280 - y1)))
    draw = ImageDraw.Draw(page)
    if patch:
        draw.rectangle((x - size, y - size // 2, x + x1 + size, y + y1 + size // 2), fill=(240, 236, 225))
    draw.text((x, y), text, font=font, fill="black" if patch else "white")
    return view(planted.jpeg(np.asarray(page), 95))


@cache
def texts(sizes: tuple[int, int]) -> list[tuple[str, View]]:
    rng = np.random.default_rng(1014 + sizes[0])
    found = []
    for i in range(N):
        size, chinese = int(rng.integers(*sizes)), bool(i % 2)
        room = max(3, 330 // size)
        words = "".join(rng.choice(list(HAN), min(room, 10))) if chinese else " ".join(rng.choice(WORDS, 6))
        text = words if chinese else words[: min(int(room * 1.4), 26)].strip()
        found.append(("chinese" if chinese else "english", written(i, text, size)))
    return found


def test_small_type():
    name = "smallest_character"
    report(name, dropped(name, [v for _, v in texts((7, 9))]), dropped(name, [v for _, v in texts((12, 28))]))


def test_watermarks():
    names = (
        "Getty Images",
        "© 2019 M. Jones",
        "dreamstime",
        "版权所有",
        "PREVIEW",
        "www.pics.example.com",
        "视觉中国",
        "iStock",
    )
    marked = [written(i, names[i % 8], 28, patch=i % 3 == 0) for i in range(N)]
    report("watermark", dropped("watermark", marked), dropped("watermark", [v for _, v in texts((14, 30))]))


def test_languages():
    plain = [("none", view(planted.jpeg(b))) for b in backgrounds()]
    for name in ("english", "chinese", "none"):
        cases = [v for n, v in texts((14, 30)) + plain if n == name]
        found = [LABELS["text_language"](v) == name for v in cases]
        print(f"text_language, {name}: {100 * np.mean(found):.1f} % of {len(found)} right")
        assert np.mean(found) >= 0.95
