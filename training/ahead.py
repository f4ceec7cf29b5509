"""Work that a thread does while its caller is busy with what came before."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T, U = TypeVar("T"), TypeVar("U")


def one_ahead(function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """function(item) of each item, in order; while one result is in use, a thread makes the next.

    What the function raises comes where its result would have come.
    """
    with ThreadPoolExecutor(1, "ahead") as thread:
        made = None
        for item in items:
            coming = thread.submit(function, item)
            if made is not None:
                yield made.result()
            made = coming
        if made is not None:
            yield made.result()
