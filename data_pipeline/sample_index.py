"""One index for a whole encoded data set, memory-mapped: where each sample lies, its size, its class, its scores.

Fixed-width columns in one safetensors file, INDEX, of 42 bytes a sample and 2 for each score, at most 90 in all:
processes of a machine share its pages, and nothing of it is read before it is used. It counts only while every shard
has the size and the modification time that it was built from; else it is built anew from the shards' own indices
(`data_pipeline.tar_index`) and records.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.classes import UNKNOWN, domain, kind_code
from data_pipeline.shards import key_problem, list_shards, read_record, shape_problem, token_count
from data_pipeline.tar_index import BLOCK, read_member, tar_index
from files import atomic_file

INDEX = "index.safetensors"
COLUMNS = {
    "shard": np.uint32,
    "offset": np.uint64,  # of its tensors, in the shard
    "size": np.uint32,
    "record_size": np.uint32,
    "record_back": np.int32,  # its record begins so many bytes before its tensors
    "tokens": np.uint32,  # in joint attention
    "height": np.uint16,  # of its latent
    "width": np.uint16,
    "key_hash": np.uint64,
    "kind": np.uint8,  # text and source (`data_pipeline.classes.kind_code`)
    "domain": np.uint8,  # in the table's domains
}
SCORE = "score/"
"""Before the names of the columns of scores, float16, NaN where a sample has none."""
SCORES = 24
"""Scores that are kept at most, by name."""
DOMAINS = 255
"""Domains that are told apart at most, by name; more count as unknown."""
FORMAT = 3
"""Grows with a change of what is in the file."""
_NAMES = {"uint8": "U8", "int32": "I32", "uint16": "U16", "uint32": "U32", "uint64": "U64", "float16": "F16"}
_DTYPES = {name: np.dtype(dtype).newbyteorder("<") for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class Table:
    """The samples of some shards, in order."""

    shards: tuple[str, ...]
    """File names, which the column "shard" numbers."""
    columns: dict[str, np.ndarray]
    """COLUMNS and scores, all of one length."""
    problems: tuple[str, ...] = ()
    """What was passed over."""
    domains: tuple[str, ...] = (UNKNOWN,)
    """Names that the column "domain" numbers."""

    def __len__(self) -> int:
        return len(self.columns["shard"])

    def key(self, folder: Path, row: int) -> str:
        """A sample's key, from the header before its tensors. ValueError if the shard is another one by now."""
        shard = folder / self.shards[self.columns["shard"][row]]
        with open(shard, "rb") as file:
            header = os.pread(file.fileno(), BLOCK, int(self.columns["offset"][row]) - BLOCK)
        return key_of(header) or self._long_key(shard, int(self.columns["offset"][row]))

    def _long_key(self, shard: Path, offset: int) -> str:
        for entry in tar_index(shard).entries:
            if entry.members.get("safetensors", (None,))[0] == offset:
                return entry.key
        raise ValueError(f"{shard} has no sample at byte {offset}: it changed while it was in use")


def key_of(header: bytes) -> str | None:
    """The key in the tar header that precedes a sample's tensors; None if it is not all there (long, or not ASCII)."""
    name = header[:100].rstrip(b"\0")
    if not name.isascii():
        return None
    key, suffix = name[: -len(".safetensors")], name[-len(".safetensors") :]
    return key.decode("ascii") if suffix == b".safetensors" and len(name) < 100 and b"?" not in key else None


def key_hash(key: str) -> int:
    """64 bits that tell keys apart."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def shard_table(shard: Path) -> Table:
    """The sound samples of one shard. OSError if it cannot be read."""
    index, rows, scores, problems = tar_index(shard), [], [], []
    domains: list[str] = []
    if index.problem:
        problems.append(f"{shard}: {index.problem}")
    keys: set[str] = set()
    with open(shard, "rb") as file:
        for entry in index.entries:
            if why := "its key came before" if entry.key in keys else key_problem(entry.key):
                problems.append(f"{shard}/{entry.key}: {why}")
                continue
            if "json" not in entry.members or not {"latent", "txt"} <= set(entry.shapes):
                problems.append(f"{shard}/{entry.key}: not a whole sample")
                continue
            if problem := shape_problem(entry.shapes):
                problems.append(f"{shard}/{entry.key}: {problem}")
                continue
            try:
                record = read_record(read_member(file.fileno(), entry, "json"))
            except ValueError as error:
                problems.append(f"{shard}/{entry.key}: {error}")
                continue
            (offset, size), (at, record_size) = entry.members["safetensors"], entry.members["json"]
            latent = entry.shapes["latent"][2:]
            if abs(offset - at) >= 1 << 31 or max(latent) > 65535:
                problems.append(f"{shard}/{entry.key}: larger than 2 GB or 524,280 px")
                continue
            keys.add(entry.key)
            tokens = token_count(entry.shapes)
            place = (0, offset, size, record_size, offset - at)
            rows.append((*place, tokens, *latent, key_hash(entry.key), kind_code(record), 0))
            domains.append(domain(record))
            given = record.get("scores")
            scores.append({n: v for n, v in given.items() if _is_number(v)} if isinstance(given, dict) else {})
    columns = {name: np.array([r[i] for r in rows], dtype) for i, (name, dtype) in enumerate(COLUMNS.items())}
    for name in sorted({n for each in scores for n in each})[:SCORES]:
        columns[SCORE + name] = np.array([each.get(name, math.nan) for each in scores]).clip(-65504, 65504).astype("f2")
    names = _domains(domains)
    columns["domain"] = np.array([names.index(d) if d in names else 0 for d in domains], np.uint8)
    return Table((shard.name,), columns, tuple(problems), names)


def _domains(found: Iterable[str]) -> tuple[str, ...]:
    """The names that are told apart, that of the unknown first."""
    return (UNKNOWN, *sorted(set(found) - {UNKNOWN})[: DOMAINS - 1])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def join(tables: Sequence[Table]) -> Table:
    """The samples of several tables, one after another."""
    scores = sorted({name for table in tables for name in table.columns if name.startswith(SCORE)})[:SCORES]
    none = lambda table: np.full(len(table), math.nan, np.float16)  # noqa: E731
    columns = {name: [t.columns.get(name, none(t)) for t in tables] for name in (*COLUMNS, *scores)}
    domains = _domains(name for table in tables for name in table.domains)
    columns["domain"] = [renumbered(table, domains) for table in tables]
    first = np.cumsum([0, *(len(t.shards) for t in tables)])
    columns["shard"] = [part + np.uint32(start) for part, start in zip(columns["shard"], first, strict=False)]
    return Table(
        tuple(s for t in tables for s in t.shards),
        {name: np.concatenate(parts) for name, parts in columns.items()},
        tuple(p for t in tables for p in t.problems),
        domains,
    )


def renumbered(table: Table, domains: Sequence[str]) -> np.ndarray:
    """The column "domain" of a table by other numbers, 0 for what `domains` lacks."""
    numbers = [domains.index(name) if name in domains else 0 for name in table.domains]
    return np.array(numbers, np.uint8)[table.columns["domain"]]


def open_index(folder: Path) -> Table:
    """The index of all shards of a folder, memory-mapped; built, and kept if the folder can be written, if need be."""
    shards = list_shards(folder)
    stamps = [[s.name, *_stamp(s)] for s in shards]
    try:
        return _mapped(folder / INDEX, stamps)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, of other shards, or of another program
    table = join([shard_table(shard) for shard in shards])
    try:
        _write(folder / INDEX, table, stamps)
    except OSError:
        return table  # a read-only data set is indexed at each start
    return _mapped(folder / INDEX, stamps)


def _stamp(shard: Path) -> tuple[int, int]:
    stat = shard.stat()
    return stat.st_size, stat.st_mtime_ns


def _write(path: Path, table: Table, stamps: list) -> None:
    """Columns largest items first, so that each is aligned."""
    columns = dict(sorted(table.columns.items(), key=lambda c: -c[1].dtype.itemsize))
    header: dict[str, object] = {}
    at = 0
    for name, column in columns.items():
        ends = [at, at + column.nbytes]
        header[name] = {"dtype": _NAMES[column.dtype.name], "shape": [len(column)], "data_offsets": ends}
        at += column.nbytes
    about = {"shards": stamps, "problems": table.problems, "format": FORMAT, "domains": table.domains}
    header["__metadata__"] = {name: json.dumps(value) for name, value in about.items()}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for column in columns.values():
            file.write(memoryview(column.astype(column.dtype.newbyteorder("<"), copy=False)).cast("B"))


def _mapped(path: Path, stamps: list) -> Table:
    """ValueError unless the file is of these shards."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if not 0 < length <= path.stat().st_size - 8:
            raise ValueError(f"{path} is broken")
        header = json.loads(file.read(length))
    about = header.pop("__metadata__")
    if json.loads(about["shards"]) != stamps or json.loads(about["format"]) != FORMAT:
        raise ValueError(f"{path} is of other shards")
    columns = {
        name: np.memmap(path, _DTYPES[c["dtype"]], "r", 8 + length + c["data_offsets"][0], tuple(c["shape"]))
        for name, c in header.items()
    }
    if not columns.keys() >= COLUMNS.keys():
        raise ValueError(f"{path} lacks columns")
    problems, domains = (tuple(json.loads(about[name])) for name in ("problems", "domains"))
    return Table(tuple(name for name, *_ in stamps), columns, problems, domains)
