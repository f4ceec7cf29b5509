"""Work shared by processes that have nothing in common but a folder: who makes what, and who has died.

A claim is a file that only one process can create. Its holder rewrites it every BEAT_S with a new number; who sees the
same number for DEAD_S, by a clock of its own, takes the holder for dead and the claim for itself, so clocks need not
agree. A holder on this machine whose process is gone is dead at once. One that was only slow may come back and finish
what another has made meanwhile: work that is claimed must give the same bytes whoever does it, moved into place whole.
"""

import functools
import hashlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BEAT_S = 5.0
DEAD_S = 60.0


class Claims:
    """This process's claims in `folder`, kept alive by a thread until they are released or `close` is called."""

    def __init__(self, folder: Path, beat_s: float | None = None, dead_s: float | None = None):
        self.folder, self.beat_s, self.dead_s = folder, beat_s or BEAT_S, dead_s or DEAD_S
        self.me = f"{_machine()} {os.getpid()} {secrets.token_hex(4)}"
        self._lock = threading.Lock()
        self._held: set[str] = set()
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, name: str) -> bool:
        """Whether `name` is ours now: nobody had it, or its holder is dead."""
        self.folder.mkdir(parents=True, exist_ok=True)
        while not self._create(self._path(name)):
            try:
                content = self._path(name).read_bytes()
            except FileNotFoundError:
                continue  # released just now
            if not self._dead(name, content):
                return False
            if self._inherit(name, content):
                break
            return False
        self._held.add(name)
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)
            self._thread.start()
        return True

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Have a claim, once whoever has it gives it back or dies."""
        while not self.take(name):
            time.sleep(min(1.0, self.beat_s))
        try:
            yield
        finally:
            self.release(name)

    def release(self, name: str) -> None:
        """Give a claim back, if another has not taken it."""
        with self._lock:
            self._held.discard(name)
            if self._is_ours(name):
                self._path(name).unlink(missing_ok=True)

    def forget(self, name: str) -> None:
        """Remove the claim that someone who died left on finished work."""
        with suppress(FileNotFoundError):
            if self._dead(name, self._path(name).read_bytes()):
                self._path(name).unlink()

    def others(self) -> list[str]:
        """What others are at work on; claims of the dead are removed. Takes `dead_s` at most to tell."""
        end = time.monotonic() + self.dead_s + self.beat_s
        while names := [p.stem for p in self.folder.glob("*.claim") if not self._is_ours(p.stem)]:
            before = {name: self._content(name) for name in names}
            time.sleep(min(1.0, self.beat_s))
            for name in names:
                self.forget(name)
            beating = [n for n in names if self._content(n) not in (None, before[n])]
            if beating or time.monotonic() > end:
                return beating or names
        return []

    def tidy(self) -> None:
        """Remove what those who were killed left half written. Whoever is writing just now tries again."""
        for pattern in (".*.fresh", ".*.heir"):
            for file in self.folder.glob(pattern):
                file.unlink(missing_ok=True)

    def close(self) -> None:
        """Give everything back."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        for name in list(self._held):
            self.release(name)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.claim"

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(f"{self.me} 0".encode())
        return True

    def _dead(self, name: str, content: bytes) -> bool:
        """Whether the holder that wrote `content` is gone, or has written nothing else for too long."""
        machine, _, rest = content.decode(errors="replace").partition(" ")
        if machine == _machine() and not _alive(rest.partition(" ")[0]):
            return True
        before, since = self._seen.get(name, (None, 0.0))
        if content != before:
            self._seen[name] = content, time.monotonic()
            return False
        return time.monotonic() - since > self.dead_s

    def _inherit(self, name: str, content: bytes) -> bool:
        """Put our claim in the place of a dead holder's; of several who try, one succeeds."""
        digest = hashlib.blake2b(content, digest_size=8).hexdigest()
        heir = self._path(name).with_name(f".{name}.{digest}.heir")
        if not self._create(heir):
            with suppress(FileNotFoundError):
                if self._dead(heir.name, heir.read_bytes()):
                    heir.unlink()
            return False
        try:
            if self._path(name).read_bytes() != content:
                return False
            self._replace(name, 0)
        except FileNotFoundError:
            return False
        finally:
            heir.unlink(missing_ok=True)
        return True

    def _replace(self, name: str, number: int) -> None:
        fresh = self._path(name).with_name(f".{secrets.token_hex(8)}.fresh")
        fresh.write_bytes(f"{self.me} {number}".encode())
        os.replace(fresh, self._path(name))

    def _content(self, name: str) -> bytes | None:
        with suppress(FileNotFoundError):
            return self._path(name).read_bytes()
        return None

    def _is_ours(self, name: str) -> bool:
        return (self._content(name) or b"").startswith(self.me.encode())

    def _beat(self) -> None:
        number = 0
        while not self._closed.wait(self.beat_s):
            number += 1
            for name in list(self._held):
                with self._lock, suppress(OSError):  # a full disk, say: the next beat may come through
                    if name in self._held and self._is_ours(name):
                        self._replace(name, number)


@functools.cache
def _machine() -> str:
    """This boot of this machine, as processes of one numbering see it; containers differ."""
    parts = [socket.gethostname()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(), lambda: os.readlink("/proc/self/ns/pid")):
        with suppress(OSError):
            parts.append(read().strip())
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=8).hexdigest()


def _alive(pid: str) -> bool:
    """Whether a process of this machine is there; true if that cannot be told."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, OSError):
        return True
    return True
