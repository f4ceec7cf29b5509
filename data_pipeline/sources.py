"""Where raw shards come from: a folder here, HTTP, or an object store, by fsspec.

A remote shard is fetched whole, within a deadline, to a file beside the output, and deleted once it is encoded. An
address is data: none is ever given to a shell ("pipe:" addresses are refused).
"""

import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from command_line import UserError
from data_pipeline.shard_stage import file_stamp
from data_pipeline.shards import list_shards

T = TypeVar("T")
ATTEMPTS, PAUSE_S = 3, 2.0
ASKED_AT_ONCE = 32
BLOCK = 1 << 20
_NAME = re.compile(r"[\w.-]+\.tar", re.ASCII)


class Unreachable(ValueError):
    """A shard that could not be fetched."""


@dataclass(frozen=True)
class Source:
    """A raw shard."""

    address: str
    """Path or URL."""
    stamp: dict[str, Any]
    """Tells it from an older one."""
    remote: bool = False

    @contextmanager
    def local(self, spool: Path, deadline_s: float) -> Iterator[Path]:
        """A file with its bytes, for as long as the context lasts. ValueError if it cannot be had in time."""
        if not self.remote:
            yield Path(self.address)
            return
        spool.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=spool, prefix=".fetch-") as folder:
            target = Path(folder) / "shard.tar"
            try:
                persistently(deadline_s, lambda: _fetch(self.address, target, self.stamp.get("size")))
            except Exception as error:  # noqa: BLE001 - each file system raises its own
                raise Unreachable(f"{shown(self.address)} could not be fetched: {error}") from None
            yield target


def find_sources(data: str | Path, deadline_s: float) -> dict[str, Source]:
    """The shards that `data` names, by file name and in order: a folder, or URLs as in s3://bucket/{000..099}.tar or
    http://host/path/*.tar. UserError if it names none, or what cannot be a shard."""
    data = str(data)
    if data.startswith("pipe:") or "|" in data:
        raise UserError(f"{data}: shards are read from folders and URLs, never from commands")
    if "://" not in data:
        return {shard.name: Source(str(shard), file_stamp(shard)) for shard in list_shards(Path(data))}
    found: dict[str, Source] = {}
    for address in _expanded(data, deadline_s):
        name = urlsplit(address).path.rsplit("/", 1)[-1]
        if not _NAME.fullmatch(name) or name.startswith("."):
            raise UserError(f"{address}: a shard's name has letters, digits, '_', '-' and '.', and ends with .tar")
        if name in found:
            raise UserError(f"{address} and {found[name].address} have one name; shards need names of their own")
        found[name] = Source(address, {}, remote=True)
    if not found:
        raise UserError(f"{data} names no shards")
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        stamps = list(pool.map(lambda source: _stamp(source.address, deadline_s), found.values()))
    stamped = [replace(source, stamp=stamp) for source, stamp in zip(found.values(), stamps, strict=True)]
    return dict(sorted(zip(found, stamped, strict=True)))


def shown(address: str) -> str:
    """An address without what may be secret in it: user, password, query."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def persistently(deadline_s: float, function: Callable[[], T]) -> T:
    """The function's result within the deadline, tried ATTEMPTS times; its last error if it never has one."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return within(deadline_s, function)
        except (FileNotFoundError, UserError):
            raise
        except Exception:  # noqa: BLE001 - each file system raises its own
            time.sleep(PAUSE_S * 2**attempt)
    return within(deadline_s, function)


def within(deadline_s: float, function: Callable[[], T]) -> T:
    """The function's result; TimeoutError if it takes longer. What hangs is left behind in a thread."""
    result: list[T] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as e:  # noqa: BLE001 - raised again below
            error.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(deadline_s)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {deadline_s:g} s")
    if error:
        raise error[0]
    return result[0]


def _expanded(data: str, deadline_s: float) -> list[str]:
    from braceexpand import braceexpand

    addresses = []
    for pattern in braceexpand(data):
        if any(c in pattern.partition("?")[0] for c in "*["):
            scheme = pattern.split("://", 1)[0]
            found = within(deadline_s, lambda p=pattern: _system(p).glob(p))
            addresses += [f if "://" in f else f"{scheme}://{f}" for f in found]
        else:
            addresses.append(pattern)
    return addresses


def _system(address: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(address.split("://", 1)[0], use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise UserError(f"{address}: {error}") from None


def _stamp(address: str, deadline_s: float) -> dict[str, Any]:
    try:
        info = persistently(deadline_s, lambda: _system(address).info(address))
    except Exception as error:  # noqa: BLE001 - each file system raises its own
        raise UserError(f"{shown(address)}: {str(error) or type(error).__name__}") from None
    marks = {name: str(info[name]) for name in ("ETag", "etag", "LastModified", "mtime") if info.get(name)}
    return {"address": shown(address), "size": info.get("size"), **marks}


def _fetch(address: str, target: Path, size: int | None) -> None:
    with _system(address).open(address, "rb") as source, open(target, "wb") as file:
        while block := source.read(BLOCK):
            file.write(block)
    if size is not None and target.stat().st_size != size:
        raise ValueError(f"{target.stat().st_size} of {size} bytes came")
