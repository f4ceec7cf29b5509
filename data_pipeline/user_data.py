"""A user's own data as raw samples: pictures with a caption beside each, or webdataset tars as other tools write them.

Pictures in jpg or png are kept byte for byte; other formats become png. A caption is `NAME.txt`, or "caption" in
`NAME.json`, whose other fields are kept, under "user" where a name of ours means something else.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.pictures import decode
from data_pipeline.sample import RawSample, set_apart
from data_pipeline.shards import OnProblem, Problem, read_members

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")


def find_tars(data: Path) -> list[Path]:
    """The tars that `data` is or holds, by path; ValueError for another file."""
    if data.is_file():
        if data.suffix != ".tar":
            raise ValueError(f"{data} is neither a folder nor a .tar")
        return [data]
    return sorted(p for p in data.rglob("*.tar") if not p.name.startswith("."))


def find_pictures(data: Path) -> list[Path]:
    """The picture files in a folder and the folders below it, by path."""
    visible = lambda p: not any(part.startswith(".") for part in p.relative_to(data).parts)  # noqa: E731
    return sorted(p for p in data.rglob("*") if p.suffix[1:].lower() in PICTURES and p.is_file() and visible(p))


@dataclass(frozen=True)
class PictureFile:
    """A picture of a user's folder, and where its caption should be."""

    path: Path
    name: str
    """Path below the folder."""

    @property
    def caption_files(self) -> list[Path]:
        """Those that exist, the text first."""
        return [p for p in (self.path.with_suffix(".txt"), self.path.with_suffix(".json")) if p.is_file()]

    def read(self) -> RawSample:
        """The sample; ValueError says what is wrong with it. The picture is decoded to see that it is whole."""
        texts = {p.suffix[1:]: p.read_bytes() for p in self.caption_files}
        if not texts:
            raise ValueError(f"has no caption; write one to {Path(self.name).with_suffix('.txt')}")
        return raw_sample(self.name, self.path.read_bytes(), texts)


def read_tar(tar: Path, on_problem: OnProblem) -> Iterator[RawSample]:
    """The samples of a foreign tar; damage and samples that cannot be used go to `on_problem` and are passed over."""
    for members in read_members(tar, on_problem):
        name = members["__key__"]
        ext = next((x for x in PICTURES if x in members), None)
        try:
            if ext is None:
                raise ValueError("has no picture")
            yield raw_sample(f"{tar.stem}/{name}", members[ext], members)
        except ValueError as error:
            on_problem(Problem(tar.name, name, str(error)))


def raw_sample(name: str, image: bytes, texts: dict[str, bytes]) -> RawSample:
    """Check a picture with its "txt" or "json" and bring it into our form; ValueError says what is wrong."""
    record = _record(texts)
    picture = decode(image)
    ext = next((ext for magic, ext in ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png")) if image.startswith(magic)), None)
    if ext is None:
        file, ext = io.BytesIO(), "png"
        picture.save(file, "PNG")
        image = file.getvalue()
    width, height = picture.size
    ours = {"source": "user", "file": name, "width": width, "height": height}
    theirs = [field for field, value in ours.items() if record.get(field, value) != value]
    return RawSample(sample_key(name), image, ext, set_apart(record, *theirs) | ours)


def sample_key(name: str) -> str:
    """A key that is unique to `name`, legible, and the same whatever else is in the folder."""
    legible = re.sub(r"[^A-Za-z0-9_-]+", "_", name.rpartition(".")[0] or name)[-48:].strip("_")
    return f"{legible}-{hashlib.blake2b(name.encode(), digest_size=5).hexdigest()}"


def _record(texts: dict[str, bytes]) -> dict:
    record = {}
    if "json" in texts:
        try:
            record = json.loads(texts["json"], parse_constant=_not_json)
        except ValueError as error:
            raise ValueError(f"its .json is broken ({error})") from None
        if not isinstance(record, dict):
            raise ValueError("its .json is not an object")
    if "txt" in texts:
        try:
            record["caption"] = texts["txt"].decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise ValueError("its .txt is not UTF-8") from None
    caption = record.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError('has no caption: write one to the .txt, or "caption" to the .json, beside it')
    return record


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
