"""Files that appear whole or not at all."""

import fcntl
import glob
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

DAY_S = 24 * 60 * 60


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; on success fsync it and rename it to `path`, else remove it.

    Several may write one path at once, in any processes on any hosts, each in a file of its own; the last one wins.
    """
    with _temporary(path) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    fsync(path.parent)


def link(path: Path, target: Path) -> None:
    """Make `path` a link to `target`, in place of one that is there, at once."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files that killed writers of `path` left; those of writers at work stay.

    A writer holds a lock on its file. As network file systems may not show the locks of other hosts, another host's
    file is left alone until it has not been touched for a day.
    """
    for temporary in path.parent.glob(f".tmp-*-{glob.escape(path.name)}"):
        with suppress(OSError), open(temporary, "rb+") as file:  # OSError: it is locked, or gone
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = temporary.name.endswith(f"-{_host()}-{path.name}")
            if ours or time.time() - os.fstat(file.fileno()).st_mtime > DAY_S:
                temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> BinaryIO:
    """A new file beside `path`, locked for as long as it is open."""
    while True:
        file = open(path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}-{_host()}-{path.name}"), "xb")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(file.name):
            return file
        file.close()  # another process took it for a leftover before it was locked


def _host() -> str:
    return socket.gethostname().replace("-", "_")


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, whole or not at all, the same bytes for the same data."""
    with atomic_file(path) as file:
        file.write((json.dumps(data, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode())


def hash_files(paths: Iterable[Path]) -> str:
    """Hash of files' names and contents, whatever their order."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(paths):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
