"""What is held out: which samples, and that none of them is trained on."""

import random

import numpy as np
import pytest

from data_pipeline.loader import Loader, microbatches
from data_pipeline.sample import EncodedSample
from data_pipeline.sample_index import key_hash
from training.held_out import HeldOutHook, hold_out


class Samples:
    """A data set of keys alone."""

    def __init__(self, keys: list[str]):
        self.keys, self.tokens = keys, np.ones(len(keys), np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, index: int) -> str:
        return self.keys[index]

    shards, identity, mixes_first = 5, "d", False

    def rows(self, shard: int, stop=None) -> np.ndarray:
        return np.array_split(np.arange(len(self)), self.shards)[shard]

    def key_hashes(self) -> np.ndarray:
        return np.array([key_hash(key) for key in self.keys], np.uint64)

    def __getitem__(self, index: int) -> EncodedSample:
        return EncodedSample(self.keys[index], np.zeros((16, 1, 2, 2)), np.zeros((1, 1)))


KEYS = [f"sample-{i:03d}" for i in range(50)]


def test_the_same_samples_are_held_out_wherever_they_lie():
    shuffled = random.Random(0).sample(KEYS, len(KEYS))
    held = [{part.key(i) for i in range(len(part))} for _, part in (hold_out(Samples(k), 12) for k in (KEYS, shuffled))]
    assert held[0] == held[1] and len(held[0]) == 12
    more = hold_out(Samples(KEYS), 20)[1]
    assert held[0] < {more.key(i) for i in range(20)}, "a larger share must keep what was held out before"


def test_what_is_held_out_is_never_trained_on_and_all_else_is():
    kept, held = hold_out(Samples(KEYS), 12)
    loader = Loader(kept, 19)
    seen = {s.key for _ in range(2) for batch in next(loader) for s in batch}  # 38 samples: one pass
    loader.close()
    assert seen == set(KEYS) - {held.key(i) for i in range(12)} and {held[i].key for i in range(12)} == set(KEYS) - seen


def test_a_held_out_sample_that_fits_into_no_microbatch_is_refused():
    kept, held = hold_out(Samples(KEYS), 12)
    held.tokens[7] = 5000
    with pytest.raises(ValueError, match="a held-out sample has 5000 tokens, a microbatch at most 4096"):
        HeldOutHook(1, None, None, held, 4096)
    HeldOutHook(1, None, None, kept, 4096)
    with pytest.raises(ValueError, match="a sample has 5000 tokens"):
        microbatches([3, 5000], 4096)


@pytest.mark.parametrize("count", [0, 50, 51])
def test_something_is_left_on_both_sides(count):
    with pytest.raises(ValueError, match=f"{count} of 50 samples cannot be held out"):
        hold_out(Samples(KEYS), count)
