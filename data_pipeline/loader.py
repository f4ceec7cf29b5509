"""The training loader: one global order of samples, of which every rank takes its part of each step.

The order is a function of (seed, epoch) and the data set alone. Epochs follow each other without a seam: a step is the
next `batch_size` samples, whatever epoch they belong to, so nothing is dropped. How many ranks there are decides only
who computes what. The cursor (epoch, index) resumes exactly, in any layout.
"""

import hashlib
import heapq
import json
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from data_pipeline.sample import EncodedSample, Fingerprint
from data_pipeline.shards import encoded_sample, list_shards, shape_problem, token_count
from data_pipeline.tar_index import read_member, tar_index

Cursor = tuple[int, int]
"""(epoch, index of the next sample in that epoch's order)."""

OPEN_SHARDS = 64


class EncodedDataset:
    """Random access to the encoded samples of one folder or of several.

    Folders made with another VAE, text encoder or template, or (unless `mixed_resolutions`) at another resolution, are
    refused with ValueError. Damaged shards give the samples that they still hold; `problems` says what is wrong.
    """

    def __init__(self, folders: Path | str | Sequence[Path | str], mixed_resolutions: bool = False):
        from safetensors.torch import load_file

        folders = [Path(f) for f in ([folders] if isinstance(folders, Path | str) else folders)]
        self.fingerprint = read_fingerprint(folders[0])
        self.problems: list[str] = []
        self.txt_empty: Tensor = load_file(folders[0] / "empty.safetensors")["txt"]
        self._entries = []
        tokens = []
        for place, folder in enumerate(folders):
            other = read_fingerprint(folder)
            self.fingerprint.require(
                replace(other, resolution=self.fingerprint.resolution) if mixed_resolutions else other, str(folder)
            )
            for shard in list_shards(folder):
                index = tar_index(shard)
                if index.problem:
                    self.problems.append(f"{shard}: {index.problem}")
                for entry in index.entries:
                    if "json" not in entry.members or not {"latent", "txt"} <= set(entry.shapes):
                        self.problems.append(f"{shard}/{entry.key}: not a whole sample")
                        continue
                    if problem := shape_problem(entry.shapes):
                        self.problems.append(f"{shard}/{entry.key}: {problem}")
                        continue
                    self._entries.append((shard, entry, f"@{place}" if place else ""))
                    tokens.append(token_count(entry.shapes))
        self.tokens = np.array(tokens, dtype=np.int64)
        """Tokens of each sample in joint attention."""
        if not tokens:
            why = f"; the first is {self.problems[0]}" if self.problems else ""
            raise ValueError(f"no encoded samples in {', '.join(map(str, folders))}{why}")
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def key(self, index: int) -> str:
        """The sample's key; from the second folder on followed by '@' and the folder's place.

        Randomness is a function of it, so equal keys of two folders draw different noise.
        """
        _, entry, suffix = self._entries[index]
        return entry.key + suffix

    def __getitem__(self, index: int) -> EncodedSample:
        """Read one sample; the empty prompt's hidden states are filled in. ValueError names a broken one."""
        shard, entry, suffix = self._entries[index]
        with self._lock:
            descriptor = self._descriptor(shard)
            tensors, record = (read_member(descriptor, entry, ext) for ext in ("safetensors", "json"))
        try:
            sample = encoded_sample(entry.key + suffix, tensors, record)
        except ValueError as error:
            raise ValueError(f"{shard}/{entry.key}: {error}; delete the shard and produce it again") from None
        return sample if sample.txt_empty is not None else replace(sample, txt_empty=self.txt_empty)

    def _descriptor(self, shard: Path) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = os.open(shard, os.O_RDONLY)
            if len(self._open) > OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        return self._open[shard]

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])


def read_fingerprint(folder: Path) -> Fingerprint:
    """What the encoded data set in `folder` was made with; ValueError if it is none."""
    try:
        return Fingerprint(**json.loads((folder / "dataset.json").read_text())["fingerprint"])
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is no encoded data set (no dataset.json): make one with produce.py, or run that to its end"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/dataset.json is broken ({error}); produce the data set again") from None


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of range(n) in which samples are seen in `epoch`.

    Sorts by raw words of Philox, whose stream numpy guarantees to keep, unlike its shuffles.
    """
    digest = hashlib.blake2b(f"order/{seed}/{epoch}".encode(), digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(n)
    return np.argsort(words, kind="stable")


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


def microbatches(costs: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of `costs` in as few balanced groups as keep every group at `max_tokens` or less."""
    bins = max(1, -(-sum(costs) // max_tokens))
    while True:
        groups = spread(costs, bins)
        if all(sum(costs[i] for i in group) <= max_tokens for group in groups):
            return groups
        bins += 1


class Loader:
    """Iterator over this rank's microbatches `list[list[EncodedSample]]` of one global step after another, for ever.

    `batch_size` counts samples of all ranks. Each rank has at least one microbatch a step; ranks may differ in their
    number. Ranks that share a `dp_rank` (tensor and context parallel peers) get the same. A background thread reads
    `prefetch` steps ahead. ValueError if a sample has more than `max_tokens` tokens or a rank would go empty.
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
    ):
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"data-parallel rank {dp_rank} is none of {dp_size}")
        if batch_size < dp_size:
            raise ValueError(
                f"a batch of {batch_size} leaves some of the {dp_size} data-parallel ranks without a sample"
            )
        longest = int(dataset.tokens.argmax())
        length = dataset.tokens[longest]
        if length > max_tokens:
            raise ValueError(
                f"sample {dataset.key(longest)} has {length} tokens, a microbatch at most {max_tokens}: "
                "raise max_tokens, or produce the data at a lower resolution"
            )
        self.dataset, self.batch_size, self.seed, self.max_tokens = dataset, batch_size, seed, max_tokens
        self.dp_rank, self.dp_size, self.prefetch = dp_rank, dp_size, prefetch
        self._cursor: Cursor = (0, 0)
        self._reader: _Reader | None = None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list[list[EncodedSample]]:
        if self._reader is None:
            self._reader = _Reader(self._steps(self._cursor), self.prefetch)
        self._cursor, batch = self._reader.get()
        return batch

    def state_dict(self) -> dict[str, int]:
        """The cursor after the last step that was taken, for JSON."""
        return {"epoch": self._cursor[0], "index": self._cursor[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a cursor, as if the loader had never stopped. ValueError if it isn't one of this data set."""
        epoch, index = state["epoch"], state["index"]
        if epoch < 0 or not 0 <= index < len(self.dataset):
            raise ValueError(f"the cursor {state} is not one of a data set of {len(self.dataset)} samples")
        self.close()
        self._cursor = (epoch, index)

    def close(self) -> None:
        """Stop the background thread; the next step starts it again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _steps(self, cursor: Cursor) -> Iterator[tuple[Cursor, list[list[EncodedSample]]]]:
        epoch, index = cursor
        order = epoch_order(len(self.dataset), self.seed, epoch)
        while True:
            step: list[tuple[int, int]] = []
            while len(step) < self.batch_size:
                step.append((int(order[index]), epoch))
                index += 1
                if index == len(order):
                    epoch, index = epoch + 1, 0
                    order = epoch_order(len(self.dataset), self.seed, epoch)
            yield (epoch, index), [[replace(self.dataset[i], epoch=e) for i, e in group] for group in self.share(step)]

    def share(self, step: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """This rank's microbatches of a global step, given as (index, epoch) of each sample.

        In a microbatch, samples are sorted by length: attention runs those of one length as one batch.
        """
        costs = [int(self.dataset.tokens[i]) for i, _ in step]
        mine = spread(costs, self.dp_size)[self.dp_rank]
        groups = microbatches([costs[i] for i in mine], self.max_tokens)
        return [[step[mine[j]] for j in sorted(group, key=lambda j: costs[mine[j]])] for group in groups]


class _Reader:
    """Draws from an iterator in one daemon thread, at most `depth` items ahead; passes its exception on."""

    def __init__(self, items: Iterator, depth: int):
        self._items = items
        self._queue: queue.Queue = queue.Queue(maxsize=max(1, depth))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
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

    def get(self):
        item, error = self._queue.get()
        if error is not None:
            self._queue.put((None, error))
            raise error
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
