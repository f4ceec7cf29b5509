"""Where each member of a tar lies, so that a sample can be read without the ones before it.

Built from tar headers (and safetensors headers, for tensor shapes), cached as JSON beside the tar. A cache counts only
while the tar has the size and modification time that it was built from.
"""

import json
import math
import os
import re
import struct
import tarfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from files import atomic_file

BLOCK = 512
FORMAT = 2
"""Of the cache; grows with a change of what is in it."""
LARGEST = 1 << 30
"""Bytes of a member that is read."""
LONGEST_HEADER = 100 << 20
"""Bytes of a safetensors header, as the library has it."""


@dataclass(frozen=True)
class Entry:
    """One sample of a tar."""

    key: str
    members: dict[str, tuple[int, int]]
    """extension -> (offset, size) in bytes."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """tensor name -> shape, for samples with a safetensors member."""


@dataclass(frozen=True)
class TarIndex:
    """The samples of a tar in their order, and what is wrong with the file, if anything is."""

    entries: tuple[Entry, ...]
    problem: str | None = None


def index_path(tar: Path) -> Path:
    """The cache beside `tar`."""
    return tar.with_suffix(".index.json")


def tar_index(tar: Path) -> TarIndex:
    """The index of `tar`, from its cache if that is of this very file, else from the headers (and cached anew).

    A tar that is cut or broken gives the samples before the damage and says so in `problem`. OSError if unreadable.
    """
    stamp = _stamp(tar)
    try:
        data = json.loads(index_path(tar).read_text())
        if {name: data[name] for name in stamp} == stamp:
            return _from_json(data)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no cache, or one that another program left: built again below
    index = scan(tar)
    with suppress(OSError):  # a read-only data set is indexed at each start
        keep_index(tar, index)
    return index


def keep_index(tar: Path, index: TarIndex) -> None:
    """Write the cache beside `tar`."""
    with atomic_file(index_path(tar)) as file:
        file.write(json.dumps(_stamp(tar) | _to_json(index), separators=(",", ":")).encode())


def scan(tar: Path) -> TarIndex:
    """Read the headers of `tar`, passing over the contents.

    A sample's members follow each other, as webdataset has it; a key that comes again begins another entry. Links and
    sparse members, whose contents lie elsewhere or nowhere, count for nothing.
    Python's tarfile takes a broken header for the end of the archive; here the end must be a block of zeros.
    """
    size = tar.stat().st_size
    found: list[Entry] = []
    problem = None
    with open(tar, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.size < 0 or archive.offset <= member.offset:
                        problem = f"a size that leads back, at byte {member.offset}"
                        break
                    if not member.isreg() or member.issparse():
                        continue
                    if member.offset_data + member.size > size:
                        problem = f"cut inside {member.name}"
                        break
                    folder, slash, name = member.name.rpartition("/")
                    stem, _, ext = name.partition(".")
                    key, ext = folder + slash + stem, ext.lower()
                    if not found or found[-1].key != key or ext in found[-1].members:
                        found.append(Entry(key, {}))
                    found[-1].members[ext] = (member.offset_data, member.size)
                    if ext == "safetensors":
                        with suppress(ValueError):  # this sample is broken, not those after it: it has no shapes
                            found[-1].shapes.update(tensor_shapes(file, member.offset_data, member.size))
                else:
                    file.seek(archive.offset)
                    if file.read(BLOCK) != bytes(BLOCK):
                        problem = f"no valid header at byte {archive.offset} of {size}"
        except (tarfile.TarError, ValueError, EOFError) as error:
            problem = str(error) or type(error).__name__
    return TarIndex(tuple(found), problem)


def tensor_shapes(file, offset: int, size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors block, from its header; ValueError if it doesn't fill the block."""
    at = file.tell()
    file.seek(offset)
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length)) if length <= min(size, LONGEST_HEADER) else {}
        header.pop("__metadata__", None)
        if 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0) != size:
            raise ValueError(f"broken safetensors at byte {offset}")
        for t in header.values():
            bits = int(re.search(r"\d+", t["dtype"])[0])
            begin, end = t["data_offsets"]
            if min(t["shape"], default=0) < 0 or math.prod(t["shape"]) * bits != 8 * (end - begin):
                raise ValueError(f"broken safetensors at byte {offset}: a tensor does not fill its place")
        return {name: tuple(t["shape"]) for name, t in header.items()}
    except (struct.error, UnicodeDecodeError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"broken safetensors at byte {offset}") from error
    finally:
        file.seek(at)


def read_member(descriptor: int, entry: Entry, ext: str) -> bytes:
    """The bytes of one member, by the file descriptor of its tar; any thread may call it."""
    offset, size = entry.members[ext]
    if size > LARGEST:
        raise ValueError(f"{entry.key}.{ext}: {size:,} bytes, more than {LARGEST:,}")
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise ValueError(f"{entry.key}.{ext}: {len(data)} of {size} bytes; the shard changed while it was in use")
    return data


def _stamp(tar: Path) -> dict[str, int]:
    stat = tar.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "format": FORMAT}


def _to_json(index: TarIndex) -> dict:
    samples = [[e.key, e.members, e.shapes] for e in index.entries]
    return {"problem": index.problem, "samples": samples}


def _from_json(data: dict) -> TarIndex:
    entries = (
        Entry(key, {x: (at, n) for x, (at, n) in members.items()}, {name: tuple(s) for name, s in shapes.items()})
        for key, members, shapes in data["samples"]
    )
    return TarIndex(tuple(entries), data["problem"])
