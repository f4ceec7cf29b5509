"""A function over many items, in processes or in threads, the results in order."""

import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from command_line import die_with_parent

A = TypeVar("A")
B = TypeVar("B")


def map_ordered(function: Callable[[A], B], items: Iterable[A], workers: int, chunk: int = 8) -> Iterator[B]:
    """`function` of every item, in order, in `workers` processes (1: in this one), a bounded number of items ahead.

    `function` and the items are sent to other processes, so both must pickle. ValueError if a process dies.
    """
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    import cv2

    if workers == 1:
        yield from map(function, items)
        return
    items = iter(items)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # ends OpenCV's threads: a worker forked beside them would wait for them for ever
    with ProcessPoolExecutor(workers, context, initializer=_start) as pool:
        pending: deque = deque()
        try:
            while True:
                while len(pending) < 4 * workers and (some := list(islice(items, chunk))):
                    pending.append(pool.submit(_each, function, some))
                if not pending:
                    return
                yield from pending.popleft().result()
        except BrokenProcessPool:
            raise ValueError("a worker process died (out of memory?); try fewer --workers") from None
        finally:
            for future in pending:
                future.cancel()
            cv2.setNumThreads(threads)


def map_threads(function: Callable[[A], B], items: Iterable[A], threads: int, ahead: int) -> Iterator[tuple[A, B]]:
    """(item, function of it), in order, in `threads` threads, at most `ahead` items begun and not yet taken."""
    with ThreadPoolExecutor(threads) as pool:
        begun: deque = deque()
        try:
            for item in items:
                begun.append((item, pool.submit(function, item)))
                if len(begun) == ahead:
                    first, result = begun.popleft()
                    yield first, result.result()
            while begun:
                first, result = begun.popleft()
                yield first, result.result()
        finally:
            for _, result in begun:
                result.cancel()


def _start() -> None:
    """Leave Ctrl-C to the parent, and end with it."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _each(function: Callable[[A], B], items: list[A]) -> list[B]:
    return [function(item) for item in items]
