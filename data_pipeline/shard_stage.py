"""A stage of the data line: shards in, shards of the same names out, each finished once, whatever happens in between.

A finished shard has a record beside it, `NAME.record.json`: the stage's settings, which input it was made from, and
what became of its samples. A stage that is run again redoes only shards without a valid record.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.claims import Claims
from data_pipeline.shards import Problem, list_shards
from files import remove_leftovers, write_json

Record = dict[str, Any]
POLL_S = 1.0
"""How often to look after shards that others make."""


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
        for name in ("inputs", "settings"):  # as they will be read back
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))
        foreign = {p.name for p in self.out.glob("*.tar") if not p.name.startswith(".")} - set(self.inputs)
        if foreign:
            raise ValueError(
                f"{self.out} holds shards of other data ({min(foreign)}, {len(foreign)} in all): "
                "delete the folder or choose another"
            )

    def pending(self) -> list[str]:
        """The shards that are not finished."""
        return [name for name in self.inputs if self.record(name) is None]

    def work(self, claims: Claims, may_begin: Callable[[int], bool] = lambda number: True) -> Iterator[str]:
        """Shards to make and to `finish`, in order, until all are finished, by this process or by others.

        Each is claimed while it is worked on. Shards of others are waited for, and taken over if these die; so are
        shards that `may_begin` (told of a shard's place in the order) holds back.
        """
        left = dict(enumerate(self.inputs))
        while left:
            made = False
            for number, name in list(left.items()):
                if self.record(name) is not None:
                    claims.forget(name)
                    del left[number]
                elif not may_begin(number):
                    break
                elif claims.take(name):
                    try:
                        if self.record(name) is None:
                            yield name
                    finally:
                        claims.release(name)
                    del left[number]
                    made = True
            if left and not made:
                time.sleep(POLL_S)

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

    def forget(self, name: str) -> None:
        """Remove the record of a shard that is out of date."""
        self._record_path(name).unlink(missing_ok=True)

    def records(self) -> list[Record]:
        """What is known about the finished shards, in order."""
        return [record for name in self.inputs if (record := self.record(name)) is not None]

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
