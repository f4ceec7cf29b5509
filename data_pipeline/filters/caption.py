"""Stage 3, on the caption: does it say anything about the picture."""

import re

from data_pipeline.filters.tools import tokenizer
from data_pipeline.filters.view import View

_REFUSAL = re.compile(
    r"\b(i('m| am) (sorry|unable)|i (can(no|')t|cannot|am not able to|do not have)|as an ai|sorry, (but )?i)\b"
    r"|(抱歉|对不起|无法(查看|识别|描述|提供)|作为(一个)?(人工智能|AI))",
    re.IGNORECASE,
)
_REMAINS = re.compile(
    r"https?://|www\.|<[a-z/!][^>]*>|&(nbsp|amp|quot|lt|gt);|\{\{|\}\}|%[0-9A-F]{2}|�|Ã.|â€"
    r"|^\W*(img|dsc|dscn|image|photo|picture|untitled|screenshot|null|none|nan|undefined|n/?a|jpe?g|png)"
    r"[\s_\-.\d]*(jpe?g|png|gif)?\W*$",
    re.IGNORECASE,
)
_WORD = re.compile(r"[一-鿿぀-ヿ가-힯]|[^\W\d_]+", re.UNICODE)


def caption_words(view: View) -> float:
    """Words in the caption; each Chinese, Japanese or Korean character counts as one."""
    return float(len(_WORD.findall(view.caption)))


def token_length(view: View) -> float:
    """Tokens of the caption, by the text encoder's tokenizer."""
    return float(len(tokenizer(view.tools.components)(view.caption).input_ids))


def invalid_caption(view: View) -> float:
    """1 if the caption is a refusal, a file name, markup, a URL, mojibake, or repeats itself; else 0."""
    return float(says_nothing(view.caption))


def says_nothing(text: str) -> bool:
    """Whether a caption is empty, a refusal, a file name, markup, a URL, mojibake, or repeats itself."""
    text = text.strip()
    return bool(not text or _REFUSAL.search(text) or _REMAINS.search(text) or _repeats(text))


def _repeats(text: str) -> bool:
    words = [w.lower() for w in _WORD.findall(text)]
    if len(words) < 8:
        return len(words) >= 3 and len(set(words)) == 1
    pairs = list(zip(words, words[1:], strict=False))
    return len(set(pairs)) < 0.35 * len(pairs)
