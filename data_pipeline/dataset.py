"""Random access to encoded samples, by a memory-mapped index (`data_pipeline.sample_index`)."""

import hashlib
import json
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data_pipeline.sample import EncodedSample, Fingerprint
from data_pipeline.sample_index import SCORE, Table, key_of, open_index, renumbered
from data_pipeline.shards import encoded_sample
from data_pipeline.tar_index import BLOCK

OPEN_SHARDS = 64
LIVE = "live.json"
"""What a data set that is still being made has in place of dataset.json (see `data_pipeline.live`)."""


class ShardReader:
    """Reads samples of shards, of which the last few stay open."""

    def __init__(self):
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, folder: Path, table: Table, row: int, suffix: str = "") -> EncodedSample:
        """A row of a folder's table, `suffix` added to its key. ValueError names a broken sample."""
        shard = folder / table.shards[table.columns["shard"][row]]
        at = {name: int(table.columns[name][row]) for name in ("offset", "size", "record_size", "record_back")}
        with self._lock:
            descriptor = self._descriptor(shard)
            block = os.pread(descriptor, BLOCK + at["size"], at["offset"] - BLOCK)
            record = os.pread(descriptor, at["record_size"], at["offset"] - at["record_back"])
        key = key_of(block[:BLOCK]) or table.key(folder, row)
        try:
            if (len(block), len(record)) != (BLOCK + at["size"], at["record_size"]):
                raise ValueError("it is cut; the shard changed while it was in use")
            return encoded_sample(key + suffix, block[BLOCK:], record)
        except ValueError as error:
            raise ValueError(f"{shard}/{key}: {error}; delete the shard and produce it again") from None

    def _descriptor(self, shard: Path) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = os.open(shard, os.O_RDONLY)
            if len(self._open) > OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        return self._open[shard]

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])


class EncodedDataset:
    """The encoded samples of one folder or of several.

    Folders made with another VAE, text encoder or template, or (unless `mixed_resolutions`) at another resolution, are
    refused with ValueError. Damaged shards give the samples that they still hold; `problems` says what is wrong.
    """

    def __init__(self, folders: Path | str | Sequence[Path | str], mixed_resolutions: bool = False):
        from safetensors.torch import load_file

        self.folders = [Path(f) for f in ([folders] if isinstance(folders, Path | str) else folders)]
        self.fingerprint = read_fingerprint(self.folders[0])
        for folder in self.folders[1:]:
            other = read_fingerprint(folder)
            if mixed_resolutions:
                other = replace(other, resolution=self.fingerprint.resolution)
            self.fingerprint.require(other, str(folder))
        self.txt_empty: Tensor = load_file(self.folders[0] / "empty.safetensors")["txt"]
        self._tables: list[Table] = [open_index(folder) for folder in self.folders]
        for folder, table in zip(self.folders, self._tables, strict=True):
            _require_all_shards(folder, table)
        self._ends = list(accumulate(map(len, self._tables)))
        self.problems = [problem for table in self._tables for problem in table.problems]
        if not len(self):
            why = f"; the first is {self.problems[0]}" if self.problems else ""
            raise ValueError(f"no encoded samples in {', '.join(map(str, self.folders))}{why}")
        self.tokens: np.ndarray = self.column("tokens")
        """Tokens of each sample in joint attention."""
        self._reader = ShardReader()
        firsts = [end - len(table) for table, end in zip(self._tables, self._ends, strict=True)]
        starts = [_starts(table, first) for table, first in zip(self._tables, firsts, strict=True)]
        self._starts = np.append(np.concatenate(starts), len(self))
        self.shards = len(self._starts) - 1
        """Number of shards, in all folders."""

    def __len__(self) -> int:
        return self._ends[-1]

    def key(self, index: int) -> str:
        """The sample's key; from the second folder on followed by '@' and the folder's place.

        Randomness is a function of it, so equal keys of two folders draw different noise.
        """
        place, row = self._place(index)
        return self._tables[place].key(self.folders[place], row) + _suffix(place)

    def key_hashes(self) -> np.ndarray:
        """64 bits of each sample's key without the folder's place, uint64 [samples]."""
        return self.column("key_hash")

    def scores(self, name: str) -> np.ndarray:
        """What a filter gave each sample, float16 [samples], NaN where it gave nothing."""
        missing = [np.full(len(t), np.nan, np.float16) for t in self._tables]
        parts = [t.columns.get(SCORE + name, none) for t, none in zip(self._tables, missing, strict=True)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @property
    def score_names(self) -> list[str]:
        """Filters whose scores the index holds."""
        names = {name for table in self._tables for name in table.columns if name.startswith(SCORE)}
        return sorted(name.removeprefix(SCORE) for name in names)

    def domains(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Names of domains, and which of them each sample has, uint8 [samples]."""
        names = tuple(dict.fromkeys(name for table in self._tables for name in table.domains))
        return names, np.concatenate([renumbered(table, names) for table in self._tables])

    def __getitem__(self, index: int) -> EncodedSample:
        """Read one sample; the empty prompt's hidden states are filled in. ValueError names a broken one."""
        place, row = self._place(index)
        sample = self._reader.read(self.folders[place], self._tables[place], row, _suffix(place))
        return sample if sample.txt_empty is not None else replace(sample, txt_empty=self.txt_empty)

    @property
    def mixes_first(self) -> bool:
        """Whether already the first pass permutes shards: several folders, else, would come one after the other."""
        return len(self.folders) > 1

    def count(self, shard: int, stop: threading.Event | None = None) -> int:
        """Samples of a shard."""
        return int(self._starts[shard + 1] - self._starts[shard])

    def rows(self, shard: int, stop: threading.Event | None = None) -> np.ndarray:
        """Indices of a shard's samples."""
        return np.arange(self._starts[shard], self._starts[shard + 1])

    def ready(self, shard: int) -> bool:
        """Whether a shard is there."""
        return True

    def wait(self, shards: Sequence[int], stop: threading.Event) -> None:
        """Return once one of the shards is there."""

    @cached_property
    def identity(self) -> str:
        """Tells this data from other data, or from more of it; the same for a set that grows and once it is whole."""
        found = [json.loads((f / "dataset.json").read_text()).get("identity") or self._contents() for f in self.folders]
        return found[0] if len(found) == 1 else content_hash(found)

    def _contents(self) -> str:
        """Identity of a set that was written without one."""
        names = [name for table in self._tables for name in table.shards]
        return content_hash([asdict(self.fingerprint), names, self._starts.tolist(), len(self)])

    def column(self, name: str) -> np.ndarray:
        """A column of the index (`data_pipeline.sample_index.COLUMNS`), [samples]."""
        parts = [table.columns[name] for table in self._tables]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _place(self, index: int) -> tuple[int, int]:
        """(folder, row in its table). IndexError beyond the last."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = bisect_right(self._ends, index)
        return place, int(index) - (self._ends[place - 1] if place else 0)

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        self._reader.close()


def _require_all_shards(folder: Path, table: Table) -> None:
    """ValueError if shards that the set was made of are gone."""
    if (folder / LIVE).is_file():
        missing = {name for name, _ in json.loads((folder / LIVE).read_text())["inputs"]} - set(table.shards)
        if missing:
            raise ValueError(
                f"{len(missing)} shards of {folder} are gone, {min(missing)} among them: run data_pipeline/produce.py "
                "again, which makes them anew"
            )


def _starts(table: Table, first: int) -> np.ndarray:
    """Index of each shard's first sample, where those of the table begin at `first`."""
    return first + np.searchsorted(table.columns["shard"], np.arange(len(table.shards)))


def content_hash(value: Any) -> str:
    """Hash of plain JSON data."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _suffix(place: int) -> str:
    return f"@{place}" if place else ""


def read_fingerprint(folder: Path, growing: bool = False) -> Fingerprint:
    """What the encoded data set in `folder` was made with; ValueError if it is none, or none yet unless `growing`."""
    try:
        file = folder / ("dataset.json" if not growing or (folder / "dataset.json").exists() else LIVE)
        return Fingerprint(**json.loads(file.read_text())["fingerprint"])
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder} is no encoded data set (no dataset.json): make one with produce.py, or run that to its end"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is broken ({error}); produce the data set again") from None


class MixedData:
    """Several data sets, growing or whole, as `data_pipeline.order.Mixture` numbers their samples."""

    def __init__(self, parts: Sequence[Any], source: int):
        for part in parts[1:]:
            alike = replace(part.fingerprint, resolution=parts[0].fingerprint.resolution)
            parts[0].fingerprint.require(alike, "a part of the mixture")
        self.parts = parts
        self.source = source
        """Numbers from a part's first sample to the next part's."""
        self.fingerprint, self.txt_empty = parts[0].fingerprint, parts[0].txt_empty
        self.identity = content_hash([part.identity for part in parts])
        self.problems = [problem for part in parts for problem in part.problems]
        self.tokens = _MixedTokens(self)

    def place(self, index: int) -> tuple[Any, int]:
        """The data set of a sample, and its index there."""
        number, index = divmod(int(index), self.source)
        return self.parts[number], index

    def key(self, index: int) -> str:
        part, index_there = self.place(index)
        return part.key(index_there) + _suffix(index // self.source)

    def rows(self, shard: int, stop: threading.Event | None = None) -> np.ndarray:
        """Indices of the samples of a shard of the first part."""
        return self.parts[0].rows(shard, stop)

    def __getitem__(self, index: int) -> EncodedSample:
        part, index_there = self.place(index)
        sample = part[index_there]
        return replace(sample, key=sample.key + _suffix(index // self.source))


class _MixedTokens:
    """Tokens of each sample in joint attention, by its index."""

    def __init__(self, mixed: MixedData):
        self._mixed = mixed

    def __getitem__(self, index: int) -> int:
        part, index_there = self._mixed.place(index)
        return int(part.tokens[index_there])

    def argmax(self) -> int:
        """Index of the longest sample, where all parts are whole."""
        tokens = [part.tokens for part in self._mixed.parts]
        number = max(range(len(tokens)), key=lambda n: int(tokens[n].max()))
        return number * self._mixed.source + int(tokens[number].argmax())
