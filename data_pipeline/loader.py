"""The training loader: one global order of samples, of which every rank takes its part of each step.

The order (`data_pipeline.order`) is a function of the seed and the data set alone. Epochs follow each other without a
seam: a step is the next `batch_size` samples, whatever epoch they belong to, so nothing is dropped. How many ranks
there are decides only who computes what: each gets about the same FLOPs. The cursor resumes exactly, in any layout.
"""

import heapq
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipeline.dataset import EncodedDataset
from data_pipeline.order import ByShard, Cursor, Order, Place, Shuffled
from data_pipeline.sample import EncodedSample

RETRIES_S = (0.1, 1.0, 5.0)
"""Pauses after which a sample is read again that the disk did not give."""
PATIENCE_S = 0.5
"""How often, while there are no data, it is asked whether to go on waiting."""


class Interrupted(Exception):
    """Waiting for data was interrupted."""


def spread(costs: Sequence[int], bins: int) -> list[list[int]]:
    """Indices of `costs` in `bins` groups of about equal sums: largest first, each to the group with the least so far.

    Needs at least as many positive costs as bins, so that none is empty; ties go to the earlier group. Within a group
    the order of `costs` is kept. (Graham, 1969: at most 4/3 of the best makespan.)
    """
    groups: list[list[int]] = [[] for _ in range(bins)]
    loads = [(0, group) for group in range(bins)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, least = loads[0]
        groups[least].append(i)
        heapq.heapreplace(loads, (load + costs[i], least))
    return [sorted(group) for group in groups]


def flops(tokens: int, width: int) -> int:
    """What a sample costs a block of this width, up to a factor: 24 width^2 a token for its products, 4 width tokens
    for attention to all tokens of the sample."""
    return tokens * (6 * width + tokens)


def microbatches(costs: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of `costs` in as few balanced groups as keep every group at `max_tokens` or less.

    ValueError if one cost alone is more.
    """
    if (longest := max(costs, default=0)) > max_tokens:
        raise ValueError(f"a sample has {longest} tokens, a microbatch at most {max_tokens}: raise max_tokens")
    bins = max(1, -(-sum(costs) // max_tokens))
    while True:
        groups = spread(costs, bins)
        if all(sum(costs[i] for i in group) <= max_tokens for group in groups):
            return groups
        bins += 1


class Loader:
    """Iterator over this rank's microbatches `list[list[EncodedSample]]` of one global step after another, for ever;
    over what `prepare` makes of each, if it is set before the first.

    `batch_size` counts samples of all ranks. Each rank has at least one microbatch a step; ranks may differ in their
    number. Ranks that share a `dp_rank` (tensor and context parallel peers) get the same. A background thread reads
    `prefetch` steps ahead. ValueError if a sample has more than `max_tokens` tokens or a rank would go empty; a sample
    that turns out to be broken is named and left out. `width` is the model's, of which the cost of attention depends;
    by default attention counts for nothing. With `batch_tokens` a step has about so many tokens, of all ranks, in
    however many samples, and `batch_size` counts for nothing.
    """

    def __init__(
        self,
        dataset: EncodedDataset,
        batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 0,
        max_tokens: int = 1 << 16,
        prefetch: int = 2,
        order: Order | None = None,
        width: int = 1 << 20,
        batch_tokens: int | None = None,
    ):
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"data-parallel rank {dp_rank} is none of {dp_size}")
        if batch_size < dp_size and batch_tokens is None:
            raise ValueError(
                f"a batch of {batch_size} leaves some of the {dp_size} data-parallel ranks without a sample"
            )
        self.dataset, self.batch_size, self.max_tokens = dataset, batch_size, max_tokens
        if not self.grows:
            at = int(dataset.tokens.argmax())
            self._require_fitting(at)
            if batch_tokens is not None and (longest := int(dataset.tokens[at])) * dp_size > batch_tokens:
                raise ValueError(
                    f"a batch of {batch_tokens} tokens may leave some of the {dp_size} data-parallel ranks without a "
                    f"sample, of which one has {longest}: raise --batch-tokens"
                )
        self.dp_rank, self.dp_size, self.prefetch, self.width = dp_rank, dp_size, prefetch, width
        self.batch_tokens = batch_tokens
        self.order = order or (ByShard(dataset, seed) if hasattr(dataset, "shards") else Shuffled(len(dataset), seed))
        self.buckets: Counter[str] = Counter()
        """Sizes, width x height in latent pixels, of this rank's samples in the last step."""
        self.interrupted: Callable[[], bool] = lambda: False
        """Whether waiting for data should end with `Interrupted`."""
        self.passed_over = 0
        """Broken samples so far."""
        self.prepare: Callable[[list[EncodedSample]], Any] | None = None
        """What the background thread does with each microbatch, if anything."""
        self._cursor: Cursor = self.order.first
        self._reader: _Reader | None = None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list[Any]:
        if self._reader is None:
            self._reader = _Reader(partial(self._steps, self._cursor), self.prefetch)
        self._cursor, self.buckets, batch = self._reader.get(self.interrupted)
        return batch

    @property
    def grows(self) -> bool:
        """Whether a step may have to wait for data that are still being made."""
        parts = getattr(self.dataset, "parts", [self.dataset])
        return not all(isinstance(part.tokens, np.ndarray) for part in parts)

    @property
    def depth(self) -> int:
        """Steps that are ready."""
        return 0 if self._reader is None else self._reader.depth

    def state_dict(self) -> dict[str, Any]:
        """The cursor after the last step that was taken, for JSON."""
        return {"cursor": self._cursor, **self._about()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a cursor, as if the loader had never stopped. ValueError if it is one of other data."""
        if "cursor" not in state:
            raise ValueError(
                "the checkpoint's place in the data is that of an earlier version: start a new run from it"
            )
        wrong = [name for name, value in self._about().items() if state.get(name, value) != value]
        if wrong:
            raise ValueError(
                f"the run stopped at {state['cursor']} in other data or in another order ({wrong[0]} was "
                f"{state[wrong[0]]}, is {self._about()[wrong[0]]}): give it the data that it had, or start a new run"
            )
        self.close()
        self._cursor = state["cursor"]

    def _about(self) -> dict[str, str]:
        """What a cursor is a cursor of."""
        identity = getattr(self.dataset, "identity", None)
        return {"order": self.order.describe()} | ({} if identity is None else {"data": identity})

    def close(self) -> None:
        """Stop the background thread; the next step starts it again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _steps(self, cursor: Cursor, stop: threading.Event) -> Iterator[tuple[Cursor, Counter[str], list[Any]]]:
        places = self.order.places(cursor, stop)
        while True:
            step: list[tuple[int, int]] = []
            drawn = 0
            for index, epoch, after in self._one_step(places):
                if self._fits(index):
                    step.append((index, epoch))
                cursor, drawn = after, drawn + 1
            if not drawn:
                return
            if drawn < self.dp_size:
                raise ValueError(f"{drawn} samples make a batch of {self.batch_tokens} tokens: raise --batch-tokens")
            if len(step) < self.dp_size:
                raise ValueError(f"{drawn - len(step)} of the {drawn} samples of a step are too long: raise max_tokens")
            whole = [group for places in self.share(step) if (group := self._read(places))] or [self._any_of(step)]
            buckets = Counter(_bucket(sample) for group in whole for sample in group)
            yield cursor, buckets, whole if self.prepare is None else [self.prepare(group) for group in whole]

    def _one_step(self, places: Iterator[Place]) -> Iterator[Place]:
        """The places of a step; by tokens, it ends where a sample as long as the last would lead further away."""
        if self.batch_tokens is None:
            yield from islice(places, self.batch_size)
            return
        taken = 0
        for place in places:
            tokens = int(self.dataset.tokens[place[0]])
            taken += tokens
            yield place
            if taken + tokens // 2 >= self.batch_tokens:
                return

    def _read(self, places: list[tuple[int, int]]) -> list[EncodedSample]:
        """Samples by (index, epoch); one that is broken is named and left out."""
        found = []
        for index, epoch in places:
            try:
                found.append(self._sample(index, epoch))
            except ValueError as error:
                self._pass_over(error)
        return found

    def _sample(self, index: int, epoch: int) -> EncodedSample:
        """Read a sample; where the disk fails, a few times. It isn't passed over then: peers would have it."""
        for pause in RETRIES_S:
            try:
                return replace(self.dataset[index], epoch=epoch)
            except OSError:
                time.sleep(pause)
        return replace(self.dataset[index], epoch=epoch)

    def _any_of(self, step: list[tuple[int, int]]) -> list[EncodedSample]:
        """One sample of a step of which this rank's part is all broken, as the others wait for its gradient.

        ValueError if all of the step is broken.
        """
        for index, epoch in step:
            try:
                return [self._sample(index, epoch)]
            except ValueError as error:
                problem = error
        raise ValueError(f"not one of the {len(step)} samples of a step can be read: {problem}")

    def _fits(self, index: int) -> bool:
        """Whether a sample is short enough. Of a set that still grows, one that is not is named and left out."""
        if not self.grows:
            return True  # all were looked at in the beginning
        try:
            self._require_fitting(index)
        except ValueError as error:
            self._pass_over(error)
            return False
        return True

    def _pass_over(self, error: Exception) -> None:
        self.passed_over += 1
        tqdm.write(f"passed over: {error}", sys.stderr)

    def _require_fitting(self, index: int) -> None:
        length = int(self.dataset.tokens[index])
        if length > self.max_tokens:
            raise ValueError(
                f"sample {self.dataset.key(index)} has {length} tokens, a microbatch at most {self.max_tokens}: "
                "raise max_tokens, or produce the data at a lower resolution"
            )

    def share(self, step: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """This rank's microbatches of a global step, given as (index, epoch) of each sample.

        In a microbatch, samples are sorted by length: attention runs those of one length as one batch.
        """
        costs = [int(self.dataset.tokens[i]) for i, _ in step]
        mine = spread([flops(tokens, self.width) for tokens in costs], self.dp_size)[self.dp_rank]
        groups = microbatches([costs[i] for i in mine], self.max_tokens)
        return [[step[mine[j]] for j in sorted(group, key=lambda j: costs[mine[j]])] for group in groups]


def _bucket(sample: Any) -> str:
    latent = getattr(sample, "latent", None)
    return "other" if latent is None else f"{latent.shape[-1]}x{latent.shape[-2]}"


class _Reader:
    """Draws from an iterator in one daemon thread, at most `depth` items ahead; passes its exception on."""

    def __init__(self, items: Callable[[threading.Event], Iterator], depth: int):
        """`items` makes the iterator; it is told of an event that ends its waiting."""
        self._queue: queue.Queue = queue.Queue(maxsize=max(1, depth))
        self._stop = threading.Event()
        self._items = items(self._stop)
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer
            self._put((None, error))

    def _put(self, entry: tuple) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    @property
    def depth(self) -> int:
        """Items that are ready."""
        return self._queue.qsize()

    def get(self, interrupted: Callable[[], bool]):
        while True:
            try:
                item, error = self._queue.get(timeout=PATIENCE_S)
                break
            except queue.Empty:
                if interrupted():
                    raise Interrupted from None
        if error is not None:
            self._queue.put((None, error))
            raise error
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
