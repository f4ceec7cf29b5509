"""Files that appear whole or not at all."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; on success fsync it and rename it to `path`, else remove it.

    The temporary name says host and process, so that several may write the same cache; the last one wins.
    """
    temporary = path.with_name(f".tmp-{socket.gethostname()}-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files that killed writers of `path` left; call it where no other writer can be."""
    for temporary in path.parent.glob(f".tmp-*-{path.name}"):
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, whole or not at all, the same bytes for the same data."""
    with atomic_file(path) as file:
        file.write((json.dumps(data, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode())
