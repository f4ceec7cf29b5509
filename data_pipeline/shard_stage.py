"""A stage of the data line: shards in, shards of the same names out, each finished once, whatever happens in between.

A finished shard has a record beside it, `NAME.record.json`: the stage's settings, which input it was made from, and
what became of its samples. A stage that is run again redoes only shards without a valid record.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.shards import Problem, list_shards
from files import remove_leftovers, write_json

Record = dict[str, Any]


@dataclass(frozen=True)
class ShardStage:
    """Which shards are still to be made in `out`.

    `inputs` says for each output shard, by file name, what it is made from, and `settings` everything else that the
    result depends on; both are plain JSON. ValueError if `out` holds shards that are none of these.
    """

    out: Path
    inputs: dict[str, Any]
    settings: dict[str, Any]

    def __post_init__(self):
        foreign = {p.name for p in self.out.glob("*.tar") if not p.name.startswith(".")} - set(self.inputs)
        if foreign:
            raise ValueError(
                f"{self.out} holds shards of other data ({min(foreign)}, {len(foreign)} in all): "
                "delete the folder or choose another"
            )

    def pending(self) -> list[str]:
        """The shards that are not finished."""
        return [name for name in self.inputs if self.record(name) is None]

    def my_pending(self) -> list[str]:
        """Those of this process under torchrun: of all inputs, every WORLD_SIZE-th from RANK on.

        Whose a shard is depends on no other process's progress, so ranks may begin at any time. A run with another
        number of ranks goes on with what is left; if ranks of an earlier one are still at work, a shard may be made
        twice, with the same result.
        """
        rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        return [name for name in list(self.inputs)[rank::world] if self.record(name) is None]

    def target(self, name: str) -> Path:
        return self.out / name

    def record(self, name: str) -> Record | None:
        """What `finish` was told about a shard, if it is there and was made from this input with these settings."""
        try:
            record = json.loads(self._record_path(name).read_text())
            current = record["settings"] == self.settings and record["input"] == self.inputs[name]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return record if current and self.target(name).exists() else None

    def finish(self, name: str, record: Record) -> None:
        """Mark a shard as done; call it once the shard is in place."""
        remove_leftovers(self._record_path(name))
        write_json(self._record_path(name), record | {"settings": self.settings, "input": self.inputs[name]})

    def records(self) -> list[Record]:
        """What is known about the finished shards, in order."""
        return [record for name in self.inputs if (record := self.record(name)) is not None]

    def progress(self, records: list[Record]) -> str:
        """'3 shards', or while other processes have some to finish, '2 of 3 shards'."""
        done, total = len(records), len(self.inputs)
        return f"{total} shards" if done == total else f"{done} of {total} shards (the rest is for other processes)"

    def _record_path(self, name: str) -> Path:
        return self.target(name).with_suffix(".record.json")


def shards_as_inputs(data: Path, out: Path) -> dict[str, Any]:
    """The shards of `data` as inputs of a stage that makes one shard of each in `out`; ValueError if there are none."""
    if out.resolve() == data.resolve():
        raise ValueError(f"the output folder {out} is the input folder; choose another")
    return {shard.name: file_stamp(shard) for shard in list_shards(data)}


def file_stamp(path: Path) -> dict[str, int]:
    """Tells a file from an older one of its name."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def say_skipped(records: list[Record], where: Path) -> None:
    """Print the first of what the stage in `where` passed over, a line each."""
    skipped = [problem for record in records for problem in record["skipped"]]
    for problem in skipped[:5]:
        print(f"skipped {Problem(**problem)}")
    if len(skipped) > 5:
        print(f"skipped {len(skipped) - 5} more; see {where}/*.record.json")
