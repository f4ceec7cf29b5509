"""Text to draw: passages of every length from plain text files, by language.

A corpus file is UTF-8 text with one paragraph a line. The embedded one is small: signs, sentences, letters, and old
poems and prose in the public domain, in English, Chinese and both mixed.
"""

import bisect
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.synthesis.line_breaking import has_chinese, is_ideographic

EMBEDDED = Path(__file__).parent / "corpus"
LANGUAGES = ("english", "chinese", "mixed", "other")
_SENTENCE = re.compile(r"(?<=[.!?][ ])|(?<=[.!?][\"”’][ ])|(?<=[。！？])(?![”’』」》])|(?<=[。！？][”’』」》])")
_CLAUSE = re.compile(r"[，；：、。！？,;:]\s*")
_WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*[A-Za-z]")
_LATIN = re.compile(r"[A-Za-zÀ-ɏ]")


def language_of(text: str) -> str:
    """english (also other Latin text), chinese, mixed or other, by the characters."""
    latin = _LATIN.search(text) is not None
    if has_chinese(text):
        return "mixed" if latin else "chinese"
    return "english" if latin or text.isascii() else "other"


def width_in_em(text: str) -> float:
    """About how long `text` is on a line, in em."""
    return sum(1.0 if is_ideographic(c) else 0.55 for c in text)


@dataclass(frozen=True)
class Corpus:
    """Passages sorted by width: whole paragraphs, runs of sentences, clauses and words."""

    passages: dict[str, list[str]]
    """language -> passages; languages without any are left out."""
    widths: dict[str, list[float]]

    def digest(self) -> str:
        """Hash of the passages, whichever files they came from."""
        found = hashlib.blake2b(digest_size=8)
        for language, passages in self.passages.items():
            found.update(f"{language} {len(passages)}\n".encode())
            found.update("\n".join(passages).encode())
        return found.hexdigest()

    def draw(self, rng: np.random.Generator, language: str, most: float, least: float = 0.0) -> str | None:
        """A passage of at most `most` em, its length drawn between `least` and that; None if there is none.

        Where a single paragraph can't fill the length, several are joined by newlines.
        """
        passages, widths = self.passages[language], self.widths[language]
        low = min(max(least, widths[0]), most)
        target = low * (most / low) ** rng.random() ** 0.5
        parts: list[str] = []
        room = target
        while room >= max(widths[0], 0.4 * target):
            stop = bisect.bisect_right(widths, room)
            start = bisect.bisect_left(widths, min(max(0.6 * min(room, widths[stop - 1]), least), widths[stop - 1]))
            passage = passages[rng.integers(start, stop)]
            if passage in parts:
                break
            parts.append(passage)
            room -= width_in_em(passage) + 1
        return "\n".join(parts) or None


def read_corpus(path: Path | None = None) -> Corpus:
    """The corpus in a text file or in the .txt files of a folder; the embedded one without a path.

    Raises ValueError if there is no text or it isn't UTF-8.
    """
    path = path or EMBEDDED
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    found: dict[str, set[str]] = {}
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not UTF-8 text; convert it first") from None
        for line in text.splitlines():
            for passage in _passages_of(" ".join(line.split())):
                found.setdefault(language_of(passage), set()).add(passage)
    if not found:
        raise ValueError(f"{path} holds no text; give a UTF-8 .txt file, or a folder of them, with a paragraph a line")
    ordered = {name: sorted(found[name], key=lambda p: (width_in_em(p), p)) for name in LANGUAGES if name in found}
    return Corpus(ordered, {name: [width_in_em(p) for p in passages] for name, passages in ordered.items()})


def _passages_of(paragraph: str) -> Iterator[str]:
    if not paragraph:
        return
    yield paragraph
    sentences = [s for s in _SENTENCE.split(paragraph) if s]
    for start in range(len(sentences)):
        for stop in range(start + 1, min(start + 6, len(sentences) + 1)):
            passage = "".join(sentences[start:stop]).strip()
            if any(c.isalpha() for c in passage):
                yield passage
    if has_chinese(paragraph):
        clauses = (clause.strip(" “”‘’《》（）…") for clause in _CLAUSE.split(paragraph))
        yield from (clause for clause in clauses if has_chinese(clause))
    yield from (word for word in _WORD.findall(paragraph) if 3 <= len(word) <= 12)
