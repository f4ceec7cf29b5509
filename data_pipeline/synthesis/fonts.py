"""Fonts of this machine, and which text each of them can draw.

A passage is drawn in a face that has a visible glyph for every character of it, or not at all (the Qwen-Image report's
rule for synthetic text). DejaVu and STIX come with matplotlib's wheel, so there is always something for Latin, Greek
and Cyrillic; Chinese and the rest come from the system's fonts.
"""

import functools
import hashlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ImageFont
from PIL.ImageFont import Layout

FONT_FILES = (".ttf", ".otf", ".ttc", ".otc")
NO_LETTERS = ("LastResort", "DejaVuSansDisplay", "DejaVuSerifDisplay", "STIXNonUni", "STIXSiz")
"""Files of matplotlib that draw placeholders or mathematics."""
PRINTABLE_ASCII = frozenset(range(0x20, 0x7F))


@dataclass(frozen=True)
class Face:
    """One face of a font file."""

    path: Path
    index: int
    """Place in a collection (.ttc), else 0."""
    family: str
    style: str
    """Bold, Italic, ... as the font names it."""
    look: str
    """Words for a caption: 'bold serif', 'monospaced', '' if the font doesn't say."""
    points: frozenset[int] = field(repr=False, compare=False)
    """The characters that it maps to glyphs."""

    @property
    def name(self) -> str:
        """Family and style."""
        return f"{self.family} {self.style}"

    def covers(self, text: str) -> bool:
        """Whether every character of `text` has a glyph, and every one but spaces a visible glyph."""
        chars = set(text) - {"\n"}
        return {ord(c) for c in chars} <= self.points and all(c.isspace() or _has_ink(self, c) for c in chars)

    def at(self, px: int, shaped: bool = False) -> ImageFont.FreeTypeFont:
        """The face at `px` pixels per em; `shaped` if the script needs shaping (HarfBuzz through raqm)."""
        return _load(self.path, self.index, px, shaped)


def find_faces(folders: tuple[Path, ...] | None = None) -> tuple[Face, ...]:
    """The usable faces of matplotlib's wheel and of the system (or of `folders` only), sorted by name.

    Usable: outlines, a Unicode map, and the printable ASCII characters. The first file with a name wins.
    """
    faces: dict[str, Face] = {}
    for folder in font_folders() if folders is None else folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in FONT_FILES and not path.name.startswith(NO_LETTERS):
                for face in _read_faces(path):
                    faces.setdefault(face.name, face)
    return tuple(faces[name] for name in sorted(faces))


def font_folders() -> tuple[Path, ...]:
    """Where fonts lie: matplotlib's wheel first, then the system's folders that exist.

    On Linux those are fonts/ in XDG_DATA_DIRS and XDG_DATA_HOME; set both elsewhere to do without the system's fonts.
    """
    import matplotlib

    home = Path.home()
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/share:/usr/local/share"
    own = os.environ.get("XDG_DATA_HOME") or str(home / ".local/share")
    system = {
        "darwin": [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"],
        "win32": [Path(os.environ.get("WINDIR", r"C:\Windows")) / "Fonts"],
    }.get(sys.platform, [Path(folder) / "fonts" for folder in (*shared.split(":"), own) if folder])
    return tuple(f for f in [Path(matplotlib.get_data_path()) / "fonts/ttf", *system] if f.is_dir())


def choose_face(faces: tuple[Face, ...], text: str, rng: np.random.Generator) -> Face | None:
    """A face that covers `text`: a family drawn uniformly, then one of its styles; None if no face does."""
    able: dict[str, list[Face]] = {}
    for face in faces:
        if face.covers(text):
            able.setdefault(face.family, []).append(face)
    if not able:
        return None
    family = able[list(able)[rng.integers(len(able))]]
    return family[rng.integers(len(family))]


def file_hashes(files: dict[str, Path]) -> dict[str, str]:
    """name -> hash of its file; each file is read once."""
    hashes = {}
    for path in set(files.values()):
        with open(path, "rb") as file:
            hashes[path] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
    return {name: hashes[path] for name, path in files.items()}


def _read_faces(path: Path) -> list[Face]:
    from fontTools.ttLib import TTCollection, TTFont, TTLibError

    try:
        collection = path.suffix.lower() in (".ttc", ".otc")
        fonts = TTCollection(path, lazy=True).fonts if collection else [TTFont(path, lazy=True)]
        faces = (_read_face(path, i, font) for i, font in enumerate(fonts))
        return [face for face in faces if face is not None]
    except (TTLibError, OSError, KeyError, AttributeError, AssertionError):
        return []  # a damaged font is no font


def _read_face(path: Path, index: int, font) -> Face | None:
    mapped = font["cmap"].getBestCmap() or {}
    points = frozenset(point for point, glyph in mapped.items() if glyph != ".notdef")
    # Computer Modern files of 1990 map ASCII to other glyphs; their maps hold little else.
    if not any(t in font for t in ("glyf", "CFF ", "CFF2")) or not points >= PRINTABLE_ASCII or len(points) <= 200:
        return None
    names, os2 = font["name"], font["OS/2"]
    family, style = names.getBestFamilyName() or path.stem, names.getBestSubFamilyName() or "Regular"
    words = f"{family} {style}".lower()
    serif = os2.panose.bSerifStyle if os2.panose.bFamilyType == 2 else 0
    if font["post"].isFixedPitch or "mono" in words:
        kind = "monospaced"
    elif "sans" in words or serif >= 11:
        kind = "sans-serif"
    elif "serif" in words or 2 <= serif <= 10:
        kind = "serif"
    else:
        kind = ""
    weight = "bold" if os2.usWeightClass >= 600 else "light" if os2.usWeightClass <= 300 else ""
    slant = "italic" if os2.fsSelection & 1 else ""
    return Face(path, index, family, style, " ".join(word for word in (weight, slant, kind) if word), points)


@functools.cache
def _has_ink(face: Face, char: str) -> bool:
    return face.at(24).getmask(char).getbbox() is not None


@functools.lru_cache(maxsize=512)
def _load(path: Path, index: int, px: int, shaped: bool) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, px, index, layout_engine=Layout.RAQM if shaped else Layout.BASIC)
