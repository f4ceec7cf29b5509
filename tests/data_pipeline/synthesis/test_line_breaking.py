import itertools

import pytest

from data_pipeline.synthesis.corpus import EMBEDDED
from data_pipeline.synthesis.line_breaking import NOT_AT_END, NOT_AT_START, break_lines, breaks_well, split_units


@pytest.mark.parametrize(
    ("text", "units"),
    [
        # CLREQ 3.1.3 and JIS X 4051: closing marks stay with what is before them, opening marks with what follows.
        ("他说：“好。”", ["他", "说：", "“好。”"]),
        ("《红楼梦》（一）", ["《红", "楼", "梦》", "（一）"]),
        ("慢——快……好", ["慢", "——", "快……", "好"]),
        ("twenty-one cats", ["twenty-", "one ", "cats"]),
        ("5 - 3 = 2", ["5 ", "- ", "3 ", "= ", "2"]),
        ("用 Wi-Fi 上网", ["用 ", "Wi-", "Fi ", "上", "网"]),
        ("$9.99 or 3.5%", ["$9.99 ", "or ", "3.5%"]),
        ("wait (please)!", ["wait ", "(please)!"]),
    ],
)
def test_units_are_those_of_the_rules(text: str, units: list[str]) -> None:
    assert split_units(text) == units


def test_units_agree_with_the_unicode_algorithm() -> None:
    """Against uniseg's UAX #14, on the whole embedded corpus; we don't break after a slash."""
    linebreak = pytest.importorskip("uniseg.linebreak", reason="uniseg (UAX #14) is not installed")
    for file in sorted(EMBEDDED.glob("*.txt")):
        for line in filter(None, file.read_text(encoding="utf-8").splitlines()):
            ours, theirs = (
                set(itertools.accumulate(map(len, f(line)))) for f in (split_units, linebreak.line_break_units)
            )
            assert all(line[cut - 1] == "/" for cut in ours ^ theirs), line


def test_lines_fill_the_width_and_lose_nothing() -> None:
    text = "先把米淘洗干净，浸泡三十分钟。Then cook (gently) for 10 minutes，“中途不要揭盖”。"
    for width in range(8, 40):
        lines = break_lines(text, width, len)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(len(line) <= width for line in lines)
        for before, after in zip(lines, lines[1:], strict=False):
            assert after[0] not in NOT_AT_START and before[-1] not in NOT_AT_END
            unit = split_units(after)[0].rstrip()  # greedy: the first piece of a line had no room on the one before
            assert len(before + unit) > width or len(before + " " + unit) > width


def test_newlines_end_lines_and_wide_pieces_are_refused() -> None:
    assert break_lines("one\ntwo", 10, len) == ["one", "two"]
    assert break_lines("incomprehensible", 5, len) is None


@pytest.mark.parametrize(
    ("lines", "well"),
    [
        (["净含", "量"], False),
        (["CD", "机"], False),
        (["EXIT 安", "全出口"], False),
        (["EXIT", "安全出口"], True),
        (["一本书常常要补", "上一年"], True),
        (["俶载南亩，我", "艺黍稷。"], False),
        (["俶载南亩，", "我艺黍稷。"], True),
        (["各位住户：因检修水管，本周二上午九点至十二点半停", "水。"], False),
        (["各位住户：因检修水管，本", "周二上午九点至十二点半停水。"], True),
        (["Merry", "Christmas"], True),
        (["一行"], True),
        ([], True),
    ],
)
def test_lines_that_read_well(lines: list[str], well: bool) -> None:
    assert breaks_well(lines) == well
