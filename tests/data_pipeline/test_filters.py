"""Each filter on photographs with planted defects: it catches 95 % of at least 100, and wrongly drops 3 % at most."""

from functools import cache

import numpy as np
import planted
import pytest

from data_pipeline.filters.caption import says_nothing
from data_pipeline.filters.duplicates import find_duplicates, thumbnail
from data_pipeline.filters.table import FILTERS, LABELS, SET_FILTERS
from data_pipeline.filters.view import View
from data_pipeline.sample import RawSample
from data_pipeline.stages import REPORT, Rule

RULES: dict[str, Rule] = {rule.filter: rule for stage in reversed(REPORT) for rule in stage.rules}
N = 104


def view(data: bytes, caption: str = "a photograph") -> View:
    return View(RawSample("k", data, "jpg", {"caption": caption}))


@cache
def good_views() -> list[View]:
    rng = np.random.default_rng(0)
    return [view(planted.jpeg(p, rng.integers(80, 96))) for p in planted.crops(130, seed=1)]


def dropped(name: str, views: list[View]) -> list[bool]:
    return [not RULES[name].keeps(FILTERS[name](v)) for v in views]


def check(name: str, good: list[View], bad: list[View]) -> None:
    caught, wrong = dropped(name, bad), dropped(name, good)
    assert len(bad) >= 100 and len(good) >= 100
    assert np.mean(caught) >= 0.95, f"{name} caught {np.mean(caught):.3f}"
    assert np.mean(wrong) <= 0.03, f"{name} wrongly dropped {np.mean(wrong):.3f}"


def plant(planters: tuple[planted.Planter, ...], names: tuple[str, ...] | None = None) -> list[View]:
    rng = np.random.default_rng(7)
    pictures = planted.crops(N, seed=2, names=names)
    return [view(planted.jpeg(planters[i % len(planters)](p, rng))) for i, p in enumerate(pictures)]


@pytest.mark.parametrize(
    ("name", "planters", "names"),
    [
        ("clarity", planted.BLUR, None),
        ("luma", planted.EXPOSURE, None),
        ("saturation", planted.COLOURS, planted.COLOUR),
        ("entropy", planted.EMPTY, None),
        ("texture", planted.NOISE, None),
    ],
)
def test_planted_defects_of_the_picture(name: str, planters: tuple, names: tuple[str, ...] | None):
    check(name, good_views(), plant(planters, names))


def test_broken_files():
    rng = np.random.default_rng(0)
    whole = [planted.jpeg(p) for p in planted.crops(N, seed=3)]
    broken = [
        (
            data[: int(rng.integers(0, len(data) - 2000))],  # cut
            rng.bytes(len(data)),  # something else
            b"<!DOCTYPE html><html>404 not found</html>",
            bytes(600) + data[600:],  # no header
        )[i % 4]
        for i, data in enumerate(whole)
    ]
    check("broken", good_views(), [view(data) for data in broken])


def test_files_that_compression_destroyed():
    rng = np.random.default_rng(0)
    pictures = planted.crops(2 * N, seed=4)
    bad = [planted.jpeg(p, rng.integers(1, 5)) for p in pictures]
    check("file_size", good_views(), [view(data) for data in bad])


def test_small_and_narrow_pictures():
    rng = np.random.default_rng(0)
    photos = list(planted.photographs().values())
    small, large, narrow, fair = [], [], [], []
    for i in range(N):
        photo = photos[i % len(photos)]
        side, longer = int(rng.integers(24, 256)), int(rng.integers(256, 900))
        small.append(planted.resized(photo, side / photo.shape[1], longer / photo.shape[0]))
        large.append(planted.resized(photo, int(rng.integers(256, 900)) / photo.shape[1], longer / photo.shape[0]))
        height = int(rng.integers(40, 100))
        narrow.append(planted.resized(photo, 3.4 * height / photo.shape[1], height / photo.shape[0]))
        fair.append(planted.resized(photo, rng.uniform(1, 3) * height / photo.shape[1], height / photo.shape[0]))
    as_views = lambda pictures: [view(planted.jpeg(p)) for p in pictures]  # noqa: E731
    check("resolution", as_views(large), as_views(small))
    check("aspect_ratio", as_views(fair), as_views(narrow))


def test_sideways_pictures():
    from PIL import Image

    def turned(i: int, orientation: int) -> View:
        exif = Image.Exif()
        exif[0x0112] = orientation
        return view(planted.jpeg(planted.crops(1, seed=i)[0], exif=exif))

    good = [turned(i, 1 + i % 2) for i in range(50)] + good_views()[:60]
    check("rotation", good, [turned(i, 3 + i % 6) for i in range(N)])


@pytest.mark.parametrize("seed", [5, 6])
def test_near_duplicates_are_found_and_nothing_else(seed: int):
    rng = np.random.default_rng(seed)
    originals = planted.apart(9, seed)
    copies = [planted.COPIES[i % len(planted.COPIES)](p, rng) for i, p in enumerate(originals)]
    n = len(originals)
    order = rng.permutation(2 * n)
    shuffled = [(originals + copies)[i] for i in order]
    thumbnails = np.stack([thumbnail(view(planted.jpeg(p))) for p in shuffled])
    repeats = {int(order[i]): int(order[j]) for i, j in find_duplicates(thumbnails).items()}
    pairs = [(a, b) for a, b in repeats.items() if a % n == b % n]
    assert n >= 100
    assert len(pairs) >= 0.95 * n, f"found {len(pairs)} of {n}"
    assert len(repeats) - len(pairs) <= 0.03 * 2 * n, (
        f"{len(repeats) - len(pairs)} of {2 * n} taken for another picture"
    )


def test_duplicates_do_not_depend_on_blocks_and_never_chain(monkeypatch: pytest.MonkeyPatch):
    pictures = [p for p in planted.crops(40, seed=8) for _ in range(2)]
    thumbnails = np.stack([thumbnail(view(planted.jpeg(p, 60 + i % 30))) for i, p in enumerate(pictures)])
    whole = find_duplicates(thumbnails)
    monkeypatch.setattr("data_pipeline.filters.duplicates.BLOCK", 7)
    assert find_duplicates(thumbnails) == whole
    assert not set(whole.values()) & set(whole)
    assert all(j < i for i, j in whole.items()) and {2 * i + 1 for i in range(40)} <= set(whole)


GOOD_CAPTIONS = [
    "A cat sleeps on the sofa", "two cups of coffee", "红色的花", "一只猫坐在窗台上，看着外面的雨。", "コーヒーカップ",
    'A sign that reads "NO PARKING"', "Une rue étroite à Paris, le soir", "Portrait of a woman; 85mm, f/1.8",
    "A poster with the text “50 % off, today only”", "Nothing but sand & sky", "The number 404 painted on a door",
    "Image of a lighthouse at dusk", "Photo: a horse, a cart and a very long road", "Картина маслом: зимний лес",
    "the cat and the dog and the bird and the fish on the mat", "New York, New York", "a screenshot of a chess program",
]  # fmt: skip
BAD_CAPTIONS = [
    "", "   ", "IMG_2031.JPG", "DSC00012", "image", "untitled.png", "null", "N/A", "photo (1).jpeg", "nan",
    "I'm sorry, but I can't help with that.", "As an AI language model, I cannot see images.",
    "Sorry, I cannot view it", "I am unable to describe this image", "抱歉，我无法识别这张图片",
    "作为一个人工智能，我没有视觉", "https://example.com/a.jpg", "Buy now www.shop.example", "<a href='x'>cat</a>",
    "a cat &amp; a dog", "caf\u00c3\u00a9 in Paris", "it\u00e2\u20ac\u2122s a cat", "broken \ufffd\ufffd text",
    "{{ title }}", "50%20off%20today", "cat cat cat", "a red a red a red a red a red a red",
    "a man in a suit, a man in a suit, a man in a suit, a man in a suit",
]  # fmt: skip


def test_captions_that_say_nothing():
    good = [f"{c}{end}" for c in GOOD_CAPTIONS for end in ("", ".", " by day", "  ", ", seen from above", " 照片")]
    bad = [f"{pad}{c}{pad}" for c in BAD_CAPTIONS for pad in ("", " ", "\n", "  ")]
    check("invalid_caption", [view(b"", c) for c in good], [view(b"", c) for c in bad])


@pytest.mark.parametrize(
    "caption",
    [
        'A protester\'s sign reads "I can\'t breathe"', "A shirt that says “I can’t breathe”", "门上的纸条写着“对不起”",
        'A card that says "Sorry, I am late"', "a poster that says 'I can't see the picture' in white letters",
        'A van with "www.anaruiz.com" on its side', "A shop window with the address “https://ana.example/a?b=1”",
        "A label that reads 100%beef", "shirt, 100%cotton", "5%20%30% as steps of a chart", "a<b and c>d",
        "Uma rua de São Paulo", "Uma placa que diz não fume", "“MAÇÃ” na etiqueta", "POKÉMON™ cards", "Đà Nẵng",
        "a wall with `<b>bold</b>` and `{{ name }}` on it", 'A lamb that says "baa baa baa baa baa baa baa baa baa"',
        "I can't believe it's not butter: a jar of margarine", "A robot dressed as an AI assistant",
        "她对他说对不起，他笑了", "一个无法识别的物体", "The dogs' dinner isn't ready; the cats' is",
    ],
)  # fmt: skip
def test_captions_may_quote_anything_and_be_in_any_language(caption: str):
    assert not says_nothing(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "I'm sorry, but I can't read the text \"OPEN\"", '"I am sorry, I cannot describe this image."',
        "I’m sorry, but I can’t.", "抱歉，我不能回答", "作为AI语言模型，我没有眼睛", 'A sign reads "CafÃ© Central"',
        "nÃ£o fume", "caf%C3%A9", "a%20red%20cat", 'See https://a.example for "SALE"', "&#39;cat&#39; on a mat",
    ],
)  # fmt: skip
def test_quotations_hide_no_bad_caption(caption: str):
    assert says_nothing(caption)


def test_words_are_counted_in_every_script():
    for caption, words in [("two cups of coffee", 4), ("一只猫", 3), ("don't 50 stop", 3), ("", 0), ("кот и пёс", 3)]:
        assert FILTERS["caption_words"](view(b"", caption)) == words


def test_every_rule_has_a_filter_and_reads_as_it_acts():
    assert {rule.filter for stage in REPORT for rule in stage.rules} == {*FILTERS, *SET_FILTERS}
    assert {label for stage in REPORT for label in stage.labels} == set(LABELS)
    for rule in RULES.values():
        given = {"at least": rule.least is not None, "at most": rule.most is not None}
        keeps = (FILTERS | SET_FILTERS)[rule.filter].keeps
        assert [side for side, there in given.items() if there] == (list(given) if keeps == "between" else [keeps])
    rule = Rule("x", least=1, most=2, exempt=("text",))
    assert [rule.keeps(v) for v in (0.99, 1, 2, 2.01, None)] == [False, True, True, False, True]
    assert not rule.applies("text") and rule.applies("photo") and str(rule) == "x ≥ 1 and ≤ 2"
