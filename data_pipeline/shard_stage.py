"""A stage of the data line: shards in, shards of the same names out, each finished once, whatever happens in between.

A finished shard has a record beside it, `NAME.record.json`: the stage's settings, which input it was made from, and
what became of its samples. A stage that is run again redoes only shards without a valid record.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.atomic import remove_leftovers, write_json
from data_pipeline.shards import list_shards

Record = dict[str, Any]


def my_share(items: list) -> list:
    """The items of this process under torchrun: every WORLD_SIZE-th, from RANK on."""
    return items[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]


@dataclass(frozen=True)
class ShardStage:
    """Which shards of `data` are still to be made in `out`. `settings` are all that the result depends on, as JSON."""

    data: Path
    out: Path
    settings: dict[str, Any]

    def sources(self) -> list[Path]:
        """The input shards. ValueError if there are none, or if `out` holds shards that came from elsewhere."""
        sources = list_shards(self.data)
        if self.out.resolve() == self.data.resolve():
            raise ValueError(f"the output folder {self.out} is the input folder; choose another")
        foreign = {p.name for p in self.out.glob("*.tar") if not p.name.startswith(".")} - {p.name for p in sources}
        if foreign:
            raise ValueError(
                f"{self.out} holds shards that {self.data} has no input for ({min(foreign)}, {len(foreign)} in all): "
                "delete the folder or choose another"
            )
        return sources

    def pending(self) -> list[Path]:
        """The input shards without a finished output."""
        return [source for source in self.sources() if self.record(source) is None]

    def target(self, source: Path) -> Path:
        """Where the output of `source` goes."""
        return self.out / source.name

    def record(self, source: Path) -> Record | None:
        """What `finish` was told about `source`, if its output is there, from this input and these settings."""
        try:
            record = json.loads(self._record_path(source).read_text())
            current = record["settings"] == self.settings and record["input"] == _stamp(source)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return record if current and self.target(source).exists() else None

    def finish(self, source: Path, record: Record) -> None:
        """Mark `source` as done; call it once its output is in place."""
        remove_leftovers(self._record_path(source))
        write_json(self._record_path(source), record | {"settings": self.settings, "input": _stamp(source)})

    def records(self) -> Iterator[tuple[Path, Record]]:
        """(input shard, record) of every finished shard, in order."""
        for source in self.sources():
            if (record := self.record(source)) is not None:
                yield source, record

    def _record_path(self, source: Path) -> Path:
        return self.target(source).with_suffix(".record.json")


def _stamp(source: Path) -> dict[str, int]:
    stat = source.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
