"""Where a line may end: spaces, hyphens, and between Chinese, Japanese characters, with kinsoku.

Kinsoku (JIS X 4051, and GB/T 15834 for Chinese): closing marks don't begin a line, opening marks don't end one, and a
doubled dash or ellipsis isn't parted.
"""

import itertools
import re
from collections.abc import Callable

NOT_AT_START = frozenset(
    "!%),.:;?]}°’”…‰′″℃、。〃々〉》」』】〕〗〞！％），．：；？］｝～·・ー–ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮ"
)
NOT_AT_END = frozenset("([{$£¥#@‘“〈《「『【〔〖〝（［｛＄￥")
DOUBLED = frozenset("—…")
_IDEOGRAPHIC = re.compile("[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")
_CHINESE = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_RUN_AT_END, _RUN_AT_START = re.compile(f"{_CHINESE.pattern}*$"), re.compile(f"{_CHINESE.pattern}*")
SHORT = 16
"""Characters of a passage whose phrases are kept whole where there is room."""


def is_ideographic(char: str) -> bool:
    """Whether `char` stands in an em square: Chinese characters, kana, full-width marks."""
    return _IDEOGRAPHIC.match(char) is not None


def has_chinese(text: str) -> bool:
    """Whether a Chinese character is in `text`."""
    return _CHINESE.search(text) is not None


def split_units(text: str) -> list[str]:
    """Cut a paragraph into the pieces that stay together on a line; a piece keeps the spaces that follow it."""
    units: list[str] = []
    for i, char in enumerate(text):
        if i and not _may_break(text, i):
            units[-1] += char
        else:
            units.append(char)
    return units


def _may_break(text: str, i: int) -> bool:
    before, after = text[i - 1], text[i]
    if after.isspace():
        return False
    if before.isspace():
        return after not in NOT_AT_START and text[:i].rstrip()[-1:] not in NOT_AT_END
    if after in NOT_AT_START or before in NOT_AT_END or (before == after and before in DOUBLED):
        return False
    if is_ideographic(before) or is_ideographic(after):
        return '"' not in (before, after)  # a straight quote opens or closes; it stays with both neighbours
    return before == "-" and after.isalpha() and text[i - 2 : i - 1].isalpha()


def break_lines(text: str, width: float, measure: Callable[[str], float]) -> list[str] | None:
    """Fill lines of at most `width` greedily; newlines in `text` end a line too.

    `measure` gives a string's width. Returns None if a piece that must stay together is wider than a line.
    """
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for unit in split_units(paragraph):
            if measure((line + unit).rstrip()) <= width:
                line += unit
                continue
            if measure(unit.rstrip()) > width:
                return None
            lines.append(line.rstrip())
            line = unit
        lines.append(line.rstrip())
    return lines


def breaks_well(lines: list[str]) -> bool:
    """Whether lines of Chinese read well: the last one isn't a single character, and in a `SHORT` passage no phrase of
    up to four characters is parted, and no single character is parted from its phrase."""
    parted = [(len(_RUN_AT_END.search(a)[0]), len(_RUN_AT_START.match(b)[0])) for a, b in itertools.pairwise(lines)]
    if parted and parted[-1][1] == 1 and len(lines[-1]) <= 2:
        return False
    if sum(map(len, lines)) > SHORT:
        return True
    return all(not a or not b or (a + b > 4 and min(a, b) > 1) for a, b in parted)
