"""A user's own data as raw samples: pictures with a caption beside each, or webdataset tars as other tools write them.

Pictures in jpg or png are kept byte for byte; other formats become png. A caption is `NAME.txt`, or "caption" in
`NAME.json`, whose other fields are kept, under "user" where a name of ours means something else.
The result of an edit has NAME.reference.0.png and so on beside it, and perhaps NAME.mask.png; its caption is then the
instruction.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.pictures import decode
from data_pipeline.sample import RawSample, set_apart
from data_pipeline.shards import OnProblem, Problem, read_members, read_record

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "jfif", "jpe", "avif")
UNREAD = ("heic", "heif", "jxl", "jp2", "j2k", "psd", "svg", "tga", "ppm", "dng", "cr2", "cr3", "nef", "arw", "raf")
"""Pictures of kinds that are not read."""
CAPTIONS = ("txt", "json")
_PNG = b"\x89PNG"
_PARTS = {"source": "reference", "input": "reference", "before": "reference", "output": "target", "after": "target"}
_PART = re.compile(
    rf"(?:(?P<part>reference|mask|target|{'|'.join(_PARTS)})(?:[._]?(?P<number>\d+))?\.)?(?:{'|'.join(PICTURES)})"
)
"""What a picture may be called besides its extension: reference.0.png and the like are what an edit began with."""


def find_tars(data: Path) -> list[Path]:
    """The tars that `data` is or holds, by path; ValueError for another file."""
    if data.is_file():
        if data.suffix != ".tar":
            raise ValueError(f"{data} is neither a folder nor a .tar")
        return [data]
    return sorted(p for p in data.rglob("*.tar") if not p.name.startswith("."))


def find_pictures(data: Path) -> dict[Path, list[Path]]:
    """The picture files in a folder and the folders below it, by path, each with its references and mask, if any."""
    files = [file for file in list_files(data) if file.suffix[1:].lower() in PICTURES]
    stems = {p.with_suffix("") for p in files}
    found: dict[Path, list[Path]] = {}
    parts: dict[Path, list[Path]] = {}
    for file in files:
        of = _without_part(file)
        if of != file.with_suffix("") and of in stems:
            parts.setdefault(of, []).append(file)
        else:
            found[file] = parts.setdefault(file.with_suffix(""), [])
    return found


def find_unread(data: Path) -> list[str]:
    """Names of captioned pictures in a folder that are of kinds that are not read, or what an edit began with is."""
    files = list_files(data)
    captioned, drawn = (
        {f.with_suffix("") for f in files if f.suffix[1:].lower() in kinds} for kinds in (CAPTIONS, PICTURES)
    )
    unread = [f for f in files if f.suffix[1:].lower() in UNREAD and f.with_suffix("") not in drawn]
    return [name_of(file, data) for file in unread if _without_part(file) in captioned]


def _without_part(file: Path) -> Path:
    """What a file is a part of: NAME of NAME.reference.0.png, NAME.mask.png and NAME.png."""
    return file.parent / re.sub(r"\.(reference\.\d+|mask)$", "", file.stem)


def legible(name: str | Path) -> str:
    """A name as text that can be printed and stored even if its bytes are no UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")


def name_of(path: Path, folder: Path) -> str:
    """A path below a folder, legible."""
    return legible(path.relative_to(folder))


def list_files(data: Path) -> list[Path]:
    """The files in a folder and the folders below it that are not hidden, by path."""
    visible = lambda p: not any(part.startswith(".") for part in p.relative_to(data).parts)  # noqa: E731
    return sorted(p for p in data.rglob("*") if p.is_file() and visible(p))


@dataclass(frozen=True)
class PictureFile:
    """A picture of a user's folder, and where its caption should be."""

    path: Path
    name: str
    """Path below the folder."""
    parts: tuple[Path, ...] = ()
    """NAME.reference.0.png and so on, NAME.mask.png, for the result of an edit."""

    @property
    def caption_files(self) -> list[Path]:
        """Those that exist, the text first."""
        written = [[self.path.with_suffix(f".{kind}"), self.path.with_suffix(f".{kind.upper()}")] for kind in CAPTIONS]
        return [file for files in written if (file := next((f for f in files if f.is_file()), None)) is not None]

    def read(self) -> RawSample:
        """The sample; ValueError says what is wrong with it. The picture is decoded to see that it is whole."""
        texts = {p.suffix[1:].lower(): p.read_bytes() for p in self.caption_files}
        if not texts:
            raise ValueError(f"has no caption; write one to {Path(self.name).with_suffix('.txt')}")
        pictures = {p.name[len(self.path.stem) + 1 :].lower(): p.read_bytes() for p in (self.path, *self.parts)}
        return sample_of(self.name, texts | pictures)


def read_tar(tar: Path, on_problem: OnProblem, of: str | None = None) -> Iterator[RawSample]:
    """The samples of a foreign tar; damage and samples that cannot be used go to `on_problem` and are passed over.

    `of` stands before their names, in place of the tar's own name: tars in several folders may have one.
    """
    for members in read_members(tar, on_problem):
        name = legible(members["__key__"])
        try:
            yield sample_of(f"{of or tar.stem}/{name}", members)
        except ValueError as error:
            on_problem(Problem(legible(tar.name), name, str(error)))


def sample_of(name: str, members: dict[str, bytes]) -> RawSample:
    """The sample of a group of files; ValueError says what is wrong with it.

    A picture whose part isn't known is an error, too: without it the instruction of an edit would train as a caption.
    """
    parts: dict[str, list[str]] = {"": [], "target": [], "reference": [], "mask": []}
    if unread := sorted(m for m in members if m.rpartition(".")[2] in UNREAD and "." in m):
        raise ValueError(f"has a picture {unread[0]} of a kind that is not read; save it as jpg or png")
    for member in sorted(m for m in members if m.rpartition(".")[2] in PICTURES):
        if (found := _PART.fullmatch(member)) is None:
            raise ValueError(f"has a picture {member} of unknown use; call what an edit began with reference.0.png")
        parts[_PARTS.get(found["part"], found["part"] or "")].append(member)
    references = sorted(parts["reference"], key=lambda m: int(_PART.fullmatch(m)["number"] or 0))
    if [int(_PART.fullmatch(m)["number"] or 0) for m in references] != list(range(len(references))):
        raise ValueError(f"has references {', '.join(references)}; number them from 0 on, one each")
    shown = sorted(parts[""], key=PICTURES.index) or parts["target"]
    if not shown:
        raise ValueError("has no picture")
    if parts["target"] and (parts[""] or len(parts["target"]) > 1):
        raise ValueError(f"has several results, {', '.join(shown + parts['target'])}")
    mask = next((members[m] for m in parts["mask"]), None)
    return raw_sample(name, members[shown[0]], members, [members[m] for m in references], mask)


def raw_sample(
    name: str,
    image: bytes,
    texts: dict[str, bytes],
    references: Sequence[bytes] = (),
    mask: bytes | None = None,
) -> RawSample:
    """Check pictures with their "txt" or "json" and bring them into our form; ValueError says what is wrong."""
    record = _record(texts)
    picture = decode(image)
    ext = next((ext for magic, ext in ((b"\xff\xd8", "jpg"), (_PNG, "png")) if image.startswith(magic)), None)
    if ext is None:
        image, ext = _as_png(picture), "png"
    width, height = picture.size
    ours = {"source": "user", "file": name, "width": width, "height": height}
    theirs = [field for field, value in ours.items() if record.get(field, value) != value]
    before = [_png(data, f"its reference {i}") for i, data in enumerate(references)]
    changed = None if mask is None else _png(mask, "its mask", "L")
    return RawSample(sample_key(name), image, ext, set_apart(record, *theirs) | ours, before, changed)


def _png(data: bytes, what: str, mode: str = "RGB") -> bytes:
    """A picture as PNG, byte for byte if it is one; ValueError if it is broken."""
    try:
        picture = decode(data)
    except ValueError as error:
        raise ValueError(f"{what} {error}") from None
    return data if data.startswith(_PNG) else _as_png(picture.convert(mode))


def _as_png(picture: "Image") -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def sample_key(name: str) -> str:
    """A key that is unique to `name`, legible, and the same whatever else is in the folder."""
    legible = re.sub(r"[^A-Za-z0-9_-]+", "_", name.rpartition(".")[0] or name)[-48:].strip("_")
    return f"{legible}-{hashlib.blake2b(name.encode(), digest_size=5).hexdigest()}"


def _record(texts: dict[str, bytes]) -> dict:
    record = {}
    if "json" in texts:
        try:
            record = read_record(texts["json"])
        except ValueError as error:
            raise ValueError(f"its .json is broken ({error})") from None
    if "txt" in texts:
        try:
            text = texts["txt"].decode("utf-8-sig").strip()
            if text or "caption" not in record:
                record["caption"] = text
        except UnicodeDecodeError:
            raise ValueError("its .txt is not UTF-8") from None
    caption = record.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError('has no caption: write one to the .txt, or "caption" to the .json, beside it')
    return record
