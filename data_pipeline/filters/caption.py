"""Stage 3, on the caption: does it say anything about the picture."""

import re

from data_pipeline.filters.description import sample_filter
from data_pipeline.filters.tools import tokenizer
from data_pipeline.filters.view import View

_QUOTED = re.compile(
    r'"[^"]*"|“[^”]*”|„[^“”]*[“”]|«[^»]*»|»[^«]*«|「[^」]*」|『[^』]*』|《[^》]*》|`[^`]*`'
    r"|‘[^’]*’(?!\w)|(?<![\w'])'(?!\s)[^'\n]*(?:'(?=\w)[^'\n]*)*(?<!\s)'(?!\w)"
)
"""Text that a caption says is in the picture; an apostrophe inside a word opens and closes nothing."""
_CANNOT = r"i(?: can(?:no|')t| can not|(?:'m| am) (?:un|not )able to| (?:do not|don't) have)\b"
_REFUSAL = re.compile(
    rf"\b(?:sorry|apologi[sz]e)\b[,.]?(?: but)? {_CANNOT}"
    rf"|\bi(?: can(?:no|')t| can not|(?:'m| am) (?:un|not )able to) (?:help (?:you|with|identify|describ)|assist|comply"
    r"|(?:see|view|describe|identify|recogni[sz]e|process|open|access|analy[sz]e|read|display|provide|generate|tell)\b"
    r"[^.!?\n]{0,30}\b(?:it|this|that|you|image|picture|photo\w*|content|file|link|caption|description|people|person)\b)"
    rf"|\bas an? (?:ai|artificial intelligence)(?: [a-z]+){{0,3}},? (?:{_CANNOT}|i\b|my\b)|\bas an ai language model\b"
    r"|(?:抱歉|对不起)[^。！？\n]{0,12}(?:无法|不能|没法|没有办法)"
    r"|(?:我|作为[^，。]{1,12}[，,]?我?)(?:无法|不能)(?:查看|看到|识别|描述|提供|回答|处理)"
    r"|无法(?:查看|看到|识别|描述|提供|访问)[^。，的]{0,8}(?:图片|图像|照片|内容|信息)"
    r"|(?:图片|图像|照片)无法(?:查看|识别|显示|加载|打开)"
    r"|作为(?:一[个名款])?(?:人工智能|AI)(?:语言|助手|模型)*[，,]?我",
    re.IGNORECASE,
)
_REMAINS = re.compile(
    r"https?://|\bwww\.\w|</?[a-z][a-z0-9]*(?:\s[^<>]*=[^<>]*)?\s*/?>|<!--|&(?:[a-z]{2,6}|#\d{1,6});|\{\{|\}\}"
    r"|%[c-f][0-9a-f]%[89ab][0-9a-f]|\w%2[0-9a-f](?=[^\W\d_])",
    re.IGNORECASE,
)
"""URLs, tags, entities, templates, percent-encoded letters (of UTF-8) and punctuation (before a letter)."""
_FILE_NAME = re.compile(
    r"\W*(img|dsc|dscn|image|photo|picture|untitled|screenshot|null|none|nan|undefined|n/?a|jpe?g|png)"
    r"[\s_\-.()\d]*(jpe?g|png|gif)?\W*",
    re.IGNORECASE,
)
_WORD = re.compile(r"[一-鿿぀-ヿ가-힯]|[^\W\d_]+", re.UNICODE)


@sample_filter(keeps="between", title="words in the caption")
def caption_words(view: View) -> float:
    """Words in the caption; each Chinese, Japanese or Korean character counts as one."""
    return float(len(_WORD.findall(view.caption)))


@sample_filter(keeps="at most", title="tokens of the caption", needs="tokenizer")
def token_length(view: View) -> float:
    """Tokens of the caption, by the text encoder's tokenizer."""
    return float(len(tokenizer(view.tools.components)(view.caption).input_ids))


@sample_filter(keeps="at most", title="a caption that says nothing")
def invalid_caption(view: View) -> float:
    """1 if the caption is a refusal, a file name, markup, a URL, mojibake, or repeats itself; else 0."""
    return float(says_nothing(view.caption))


def says_nothing(text: str) -> bool:
    """Whether a caption is empty, a refusal, a file name, markup, a URL, mojibake, or repeats itself.

    What it quotes is in the picture and may be anything but mojibake, which no sign shows.
    """
    text = text.strip()
    if not text or _FILE_NAME.fullmatch(text) or _is_misdecoded(text):
        return True
    said = _QUOTED.sub('""', text)
    said = (said if _WORD.search(said) else text).replace("’", "'")
    return bool(_REFUSAL.search(said) or _REMAINS.search(said) or _repeats(said))


def _is_misdecoded(text: str) -> bool:
    """Whether bytes were lost, or UTF-8 was read as another encoding, in the caption or in something that it quotes.

    Quotations are judged apart, for “MAÇÃ” ends in bytes that could be UTF-8.
    """
    from ftfy.badness import is_bad

    quoted = [q[1:-1] for q in _QUOTED.findall(text)]
    return "\ufffd" in text or any(map(is_bad, [_QUOTED.sub('""', text), *quoted]))


def _repeats(text: str) -> bool:
    words = [w.lower() for w in _WORD.findall(text)]
    if len(words) < 8:
        return len(words) >= 3 and len(set(words)) == 1
    pairs = list(zip(words, words[1:], strict=False))
    return len(set(pairs)) < 0.35 * len(pairs)
