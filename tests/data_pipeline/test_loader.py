import json
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.dataset import EncodedDataset
from data_pipeline.loader import Loader, microbatches, spread
from data_pipeline.order import permutation
from data_pipeline.sample import EncodedSample, Fingerprint
from data_pipeline.shards import shard_name, write_encoded

FINGERPRINT = Fingerprint(vae="v", text_encoder="t", template="p", resolution=64)


def make(folder: Path, n: int = 23, shards: int = 3, fingerprint: Fingerprint = FINGERPRINT, prefix: str = "k") -> Path:
    folder.mkdir()
    rng = np.random.default_rng(len(prefix))
    samples = [
        EncodedSample(
            f"{prefix}{i:03d}",
            torch.full((16, 1, 2 * int(rng.integers(1, 7)), 2 * int(rng.integers(1, 7))), float(i)),
            torch.full((int(rng.integers(1, 40)), 8), float(i)).bfloat16(),
            [torch.zeros(16, 1, 4, 4)] * (i % 3 == 0),
            meta={"caption": str(i)},
        )
        for i in range(n)
    ]
    for s in range(shards):
        write_encoded(folder / shard_name(s), samples[s::shards])
    (folder / "dataset.json").write_text(json.dumps({"fingerprint": asdict(fingerprint)}))
    save_file({"txt": torch.ones(5, 8).bfloat16()}, folder / "empty.safetensors")
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    return EncodedDataset(make(tmp_path_factory.mktemp("loader") / "a"))


def names(microbatches: list[list[EncodedSample]]) -> list[list[tuple[str, int]]]:
    return [[(s.key, s.epoch) for s in group] for group in microbatches]


def take(loader: Loader, steps: int) -> list:
    result = [names(next(loader)) for _ in range(steps)]
    loader.close()
    return result


def test_samples_are_whole(dataset: EncodedDataset):
    assert len(dataset) == 23 and not dataset.problems
    for i in (22, 0, 7):
        sample = dataset[i]
        number = int(sample.key[1:])
        assert sample.meta == {"caption": str(number)} and bool((sample.latent == number).all())
        assert torch.equal(sample.txt_empty, torch.ones(5, 8).bfloat16())
        pictures = [sample.latent, *sample.references]
        assert dataset.tokens[i] == len(sample.txt) + sum(p[0].numel() // 4 for p in pictures)


def test_every_epoch_sees_every_sample_once_in_an_order_of_its_own(dataset: EncodedDataset):
    steps = take(Loader(dataset, batch_size=5, seed=1, max_tokens=200), 14)  # 70 samples: 3 epochs and one sample
    flat = Counter(name for step in steps for group in step for name in group)
    assert max(flat.values()) == 1
    for epoch in range(3):
        assert sum(e == epoch for _, e in flat) == 23
    orders = [permutation(23, "order", seed, epoch).tolist() for seed in (1, 2) for epoch in (0, 1)]
    assert all(sorted(o) == list(range(23)) for o in orders) and len(set(map(tuple, orders))) == 4


def test_the_order_is_frozen():
    assert permutation(8, "order", 0, 0).tolist() == [0, 1, 6, 7, 3, 4, 2, 5]


def test_a_batch_may_be_larger_than_the_data_set(dataset: EncodedDataset):
    (step,) = take(Loader(dataset, batch_size=60, max_tokens=10_000), 1)
    assert Counter(e for group in step for _, e in group) == {0: 23, 1: 23, 2: 14}


@pytest.mark.parametrize("dp_size", [1, 2, 3, 5])
def test_layouts_share_each_step_and_its_samples(dataset: EncodedDataset, dp_size: int):
    whole = take(Loader(dataset, batch_size=7, seed=3, max_tokens=10_000), 8)
    ranks = [take(Loader(dataset, 7, rank, dp_size, seed=3, max_tokens=150), 8) for rank in range(dp_size)]
    again = [take(Loader(dataset, 7, rank, dp_size, seed=3, max_tokens=150, prefetch=1), 8) for rank in range(dp_size)]
    assert ranks == again
    cost = {dataset.key(i): int(dataset.tokens[i]) for i in range(len(dataset))}
    for step, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert Counter(s for part in parts for group in part for s in group) == Counter(step[0])
        assert all(part and all(part) for part in parts)
        assert max(sum(cost[k] for k, _ in group) for part in parts for group in part) <= 150


def test_spread_is_near_the_best_possible():
    rng = np.random.default_rng(0)
    for _ in range(300):
        bins = int(rng.integers(1, 9))
        costs = rng.integers(1, 4000, size=int(rng.integers(bins, 65))).tolist()
        groups = spread(costs, bins)
        assert sorted(i for g in groups for i in g) == list(range(len(costs))) and all(groups)
        assert all(a < b for g in groups for a, b in pairwise(g))
        lower = max(max(costs), sum(costs) / bins)
        if len(costs) > 2 * bins:
            lower = max(lower, sum(sorted(costs)[-bins - 1 :][:2]))
        assert max(sum(costs[i] for i in g) for g in groups) <= (4 / 3) * lower
        packed = microbatches(costs, 4000)
        assert sorted(i for g in packed for i in g) == list(range(len(costs)))
        assert all(0 < sum(costs[i] for i in g) <= 4000 for g in packed)


def test_resume_goes_on_exactly_also_in_another_layout(dataset: EncodedDataset):
    everything = take(Loader(dataset, 7, seed=5, max_tokens=10_000), 12)
    for stop in (0, 1, 3, 9):
        loader = Loader(dataset, 7, 0, 2, seed=5, max_tokens=120)
        for _ in range(stop):
            next(loader)
        time.sleep(0.05)  # the thread reads ahead; the cursor must not
        state = json.loads(json.dumps(loader.state_dict()))
        loader.close()
        parts = []
        for rank in range(3):
            fresh = Loader(dataset, 7, rank, 3, seed=5, max_tokens=120)
            fresh.load_state_dict(state)
            parts.append(take(fresh, 12 - stop))
        for step, shares in zip(everything[stop:], zip(*parts, strict=True), strict=True):
            assert sorted(s for share in shares for group in share for s in group) == sorted(step[0])


def test_one_thread_reads_a_bounded_number_of_steps_ahead(dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch):
    read = []
    original = EncodedDataset.__getitem__
    monkeypatch.setattr(EncodedDataset, "__getitem__", lambda self, i: read.append(i) or original(self, i))
    before = threading.active_count()
    loader = Loader(dataset, 4, prefetch=3, max_tokens=10_000)
    next(loader)
    deadline = time.monotonic() + 5
    while len(read) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(read) == 4 * 5 and threading.active_count() == before + 1  # 1 taken, 3 queued, 1 waiting
    loader.close()
    assert threading.active_count() == before


def test_a_shard_that_changed_is_an_error_that_names_it_each_time(tmp_path: Path):
    folder = make(tmp_path / "a", n=4, shards=1)
    dataset = EncodedDataset(folder)
    (folder / shard_name(0)).write_bytes(b"")
    loader = Loader(dataset, 2)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"not one of the 2 .*shard-000000.tar has no sample at byte \d+: it changed"
        ):
            next(loader)


def test_unsound_samples_are_refused_with_their_names(tmp_path: Path):
    good = torch.ones(16, 1, 4, 4), torch.ones(3, 8).bfloat16()
    nan = good[0].clone()
    nan[3, 0, 1, 2] = float("nan")
    folder = make(tmp_path / "a", n=2, shards=1)
    unsound = {
        "half": (good[0].half(), good[1], r"latent is torch.float16, not torch.float32"),
        "wide": (good[0], good[1].float(), r"txt is torch.float32, not torch.bfloat16"),
        "nan": (nan, good[1], "latent holds NaN"),
        "infinite": (good[0], good[1] * float("inf"), "txt holds NaN or infinity"),
    }
    misshapen = {
        "flat": (good[0][:, 0], good[1], "latent has shape"),
        "thin": (good[0][:4], good[1], "latent has shape"),
        "odd": (good[0][..., :3], good[1], "latent has shape"),
        "empty": (good[0], good[1][:0], "txt has shape"),
    }
    samples = [EncodedSample(k, x.clone(), t, meta={"caption": ""}) for k, (x, t, _) in (unsound | misshapen).items()]
    write_encoded(folder / shard_name(1), [*samples, EncodedSample("good", *good, meta={"caption": ""})])
    dataset = EncodedDataset(folder)
    index = {dataset.key(i): i for i in range(len(dataset))}
    assert set(index) == {"k000", "k001", "good", *unsound}
    for (key, (_, _, what)), problem in zip(misshapen.items(), dataset.problems, strict=True):
        assert f"{shard_name(1)}/{key}: its {what}" in problem
    for key, (_, _, what) in unsound.items():
        with pytest.raises(ValueError, match=f"{shard_name(1)}/{key}: its {what}"):
            dataset[index[key]]
    assert dataset[index["good"]].key == "good"
    (folder / shard_name(0)).unlink()
    write_encoded(folder / shard_name(1), [s for s in samples if s.key in misshapen])
    with pytest.raises(ValueError, match="no encoded samples in .*; the first is .*flat: its latent has shape"):
        EncodedDataset(folder)


def test_cut_shards_give_what_they_hold_and_are_recorded(tmp_path: Path):
    folder = make(tmp_path / "a")
    shard = folder / shard_name(1)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    dataset = EncodedDataset(folder)
    assert 15 < len(dataset) < 23 and len(dataset.problems) >= 1 and all("shard-000001" in p for p in dataset.problems)
    assert {dataset[i].key for i in range(len(dataset))} == {dataset.key(i) for i in range(len(dataset))}


def test_folders_join_only_if_made_alike(tmp_path: Path):
    a, b = make(tmp_path / "a", n=5), make(tmp_path / "b", n=4, prefix="other")
    assert len(EncodedDataset([a, b])) == 9
    c = make(tmp_path / "c", fingerprint=replace(FINGERPRINT, vae="w"))
    with pytest.raises(ValueError, match=r"c was encoded with something else \(vae: w there, v here\)"):
        EncodedDataset([a, c])
    d = make(tmp_path / "d", n=3, fingerprint=replace(FINGERPRINT, resolution=96))
    with pytest.raises(ValueError, match="resolution: 96 there, 64 here"):
        EncodedDataset([a, d])
    assert len(EncodedDataset([a, d], mixed_resolutions=True)) == 8
    with pytest.raises(ValueError, match="vae"):
        EncodedDataset([a, c], mixed_resolutions=True)


def test_equal_keys_of_two_folders_draw_different_noise(tmp_path: Path):
    from training.randomness import Randomness

    a, b = make(tmp_path / "a", n=3), make(tmp_path / "b", n=3)
    alone, both = EncodedDataset(a), EncodedDataset([a, b, a])
    keys = [both.key(i) for i in range(9)]
    assert keys == [both[i].key for i in range(9)] and len(set(keys)) == 9
    assert keys[:3] == [alone.key(i) for i in range(3)], "one folder's randomness stays what it was"
    noise = [Randomness(0).normal(key, 0, "noise", (4,)).tolist() for key in keys]
    assert len(set(map(tuple, noise))) == 9


def test_bad_requests_say_what_is_wrong(dataset: EncodedDataset, tmp_path: Path):
    with pytest.raises(ValueError, match="leaves some of the 4"):
        Loader(dataset, batch_size=3, dp_rank=0, dp_size=4)
    with pytest.raises(ValueError, match=r"sample k\d+ has \d+ tokens, a microbatch at most 30"):
        Loader(dataset, batch_size=3, max_tokens=30)
    with pytest.raises(ValueError, match="no dataset.json"):
        EncodedDataset(tmp_path)
