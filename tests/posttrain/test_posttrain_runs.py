"""The entries as a user runs them, on a small model: kills, ranks, what they refuse."""

import json
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_run import run_entry
from torch.distributed.checkpoint import FileSystemReader, load
from worlds import run_world, start

from training.engine.checkpoint import read_weights, resolve
from training.engine.config import EngineConfig, ParallelConfig
from training.run_folder import read_metrics
from training.source import look

GRPO = {"prompts_per_update": 2, "group": 3, "sampling_steps": 4, "window": 0, "cfg_scale": 2.0, "beta": 0.01}
NFT = {"prompts_per_update": 2, "group": 3, "sampling_steps": 4, "levels": 2, "old_decay_rate": 0.5}
DPO = {"num_pairs": 20, "pictures": 3, "sampling_steps": 3, "min_gap": 1e-5, "batch_size": 4}


DEADLINE_S = 400
"""Generous, for machines that do other things as well; hangs are what it is for."""


def entry(rank, name, steps, save_every, settings):
    run_entry(rank, name, steps, save_every, **settings)


def assert_same_run(a: Path, b: Path) -> None:
    assert read_metrics(a) == read_metrics(b)
    for ema in (False, True):
        (_, one), (_, other) = read_weights(a, ema), read_weights(b, ema)
        assert all(torch.equal(one[n], other[n]) for n in one)
    one, other = following(a), following(b)
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def following(run: Path) -> dict[str, torch.Tensor]:
    """The copies that follow the policy, apart from the moving average, in a run's newest checkpoint."""
    reader = FileSystemReader(resolve(run))
    stored = reader.read_metadata().state_dict_metadata
    tensors = {n: torch.empty(m.size) for n, m in stored.items() if n.startswith("frozen.")}
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def killed(name: str, steps: int, settings: dict, moments) -> None:
    """Begin the run again and again, killing it as soon as `moment()` holds."""
    for moment in moments:
        process, result = start(entry, 0, name, steps, 2, settings)
        while process.is_alive() and not moment():
            time.sleep(0.002)
        assert process.is_alive(), result.recv()[0]
        process.kill()
        process.join()


@pytest.mark.parametrize("name, steps, settings", [("flow_grpo", 4, GRPO), ("nft", 4, NFT), ("dpo", 10, DPO)])
def test_a_killed_run_ends_as_if_it_had_not_been(name, steps, settings, init, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_world(1, entry, name, steps, 2, settings | {"init": init, "out": whole}, deadline_s=DEADLINE_S)
    rows = lambda: len((cut / "metrics.jsonl").read_bytes().splitlines()) if (cut / "metrics.jsonl").exists() else 0  # noqa: E731
    moments = [lambda: rows() >= 1, lambda: rows() >= 3]
    if name == "dpo":
        moments.insert(0, lambda: (cut / "pairs" / "shard-000000.tar").exists())
    killed(name, steps, settings | {"init": init, "out": cut}, moments)
    run_world(1, entry, name, steps, 2, settings | {"init": init, "out": cut}, deadline_s=DEADLINE_S)
    assert_same_run(whole, cut)
    assert read_metrics(whole)[-1]["grad_norm"] > 0
    if name == "nft":
        _, weights = read_weights(whole, ema=False)
        copy = {n.removeprefix("frozen.old."): w for n, w in following(whole).items()}
        assert copy.keys() < weights.keys()  # weights that never learn need no copy
        assert not all(torch.equal(w, weights[n]) for n, w in copy.items())


@pytest.mark.parametrize(
    "name, settings", [("flow_grpo", GRPO | {"advantage_std": "batch"}), ("nft", NFT), ("dpo", DPO)]
)
def test_two_ranks_do_what_one_does(name, settings, init, tmp_path):
    """Data-parallel for all algorithms, tensor-parallel for those that draw while they train."""
    one = tmp_path / "one"
    run_world(1, entry, name, 2, 2, settings | {"init": init, "out": one}, deadline_s=DEADLINE_S)
    layouts = {"dp2": EngineConfig()}
    if name != "dpo":
        layouts["tp2"] = EngineConfig(ParallelConfig(tp=2))
    for layout, engine in layouts.items():
        two = tmp_path / layout
        run_world(2, entry, name, 2, 2, settings | {"init": init, "out": two, "engine": engine}, deadline_s=DEADLINE_S)
        for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
        (_, a), (_, b) = read_weights(one), read_weights(two)
        for n in a:
            torch.testing.assert_close(a[n], b[n], rtol=1e-3, atol=1e-4)
        a, b = following(one), following(two)
        assert a.keys() == b.keys() and (a or name != "nft")
        for n in a:
            torch.testing.assert_close(a[n], b[n], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def data(components, tmp_path_factory) -> Path:
    """A small encoded data set of two sizes."""
    from data_pipeline.encoding import Encoder
    from data_pipeline.sample import EncodedSample
    from data_pipeline.shards import shard_name, write_encoded
    from model.conditioner import Conditioner
    from vae.autoencoder import VAE

    folder = tmp_path_factory.mktemp("data")
    latents = [torch.full((16, 1, 4, 4 + 2 * (i % 2)), i / 6) for i in range(6)]
    write_encoded(
        folder / shard_name(0),
        [
            EncodedSample(f"k{i}", x, torch.ones(2 + i, 128).bfloat16(), meta={"caption": "c"})
            for i, x in enumerate(latents)
        ],
    )
    Encoder(Conditioner.from_folder(components), VAE.from_folder(components), 32).write_description(folder)
    return folder


def test_several_seeds_are_run_and_compared(init, data, tmp_path):
    settings = {"init": init, "out": tmp_path / "sft", "data": (data,), "batch_size": 4, "seeds": 2}
    settings |= {"held_out": 2, "validate_every": 2, "validation": None}
    run_world(1, entry, "sft", 2, 2, settings, deadline_s=DEADLINE_S)
    losses = [read_metrics(tmp_path / "sft" / f"seed-{seed}")[-1]["loss"] for seed in (0, 1)]
    table = json.loads((tmp_path / "sft" / "seeds.json").read_text())
    assert table["loss"]["values"] == losses and losses[0] != losses[1]
    assert table["loss"]["mean"] == pytest.approx(sum(losses) / 2)
    assert table["loss"]["low"] < table["loss"]["mean"] < table["loss"]["high"]
    assert len(table["gain/loss"]["values"]) == 2 and table["held_out/loss"]["mean"] > 0
    config = tmp_path / "sft" / "seed-0" / "config.toml"
    config.write_text(config.read_text().replace(str(data), str(tmp_path / "gone")))
    assert look(config.parent).side_px() == 32, "a run knows the size of data that are gone"


def test_sft_learns_and_stays_with_what_it_started_from(init, data, tmp_path):
    settings = {"init": init, "out": tmp_path / "sft", "data": (data,), "batch_size": 6, "condition_dropout": 0.0}
    run_world(1, entry, "sft", 30, 30, settings, deadline_s=DEADLINE_S)
    losses = [row["loss"] for row in read_metrics(tmp_path / "sft")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert list((tmp_path / "sft" / "samples").glob("*.png"))
    other = settings | {"init": tmp_path / "sft"}
    with pytest.raises(AssertionError, match=f"started from {init}, not from {tmp_path / 'sft'}"):
        run_world(1, entry, "sft", 31, 31, other, deadline_s=DEADLINE_S)


def test_the_held_out_loss_is_that_of_any_number_of_processes(init, data, tmp_path):
    settings = {"init": init, "data": (data,), "batch_size": 4, "held_out": 2, "validate_every": 15, "validation": None}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo cats\n")
    for world, out, more in ((1, tmp_path / "one", {}), (2, tmp_path / "two", {"sample_prompts": prompts})):
        more = more | {"out": out, "sample_every": 30}
        run_world(world, entry, "sft", 30, 30, settings | more, deadline_s=DEADLINE_S)
    one, two = (
        [json.loads(r) for r in (tmp_path / name / "held_out.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [row["step"] for row in one] == [0, 15, 30] and one[2]["loss"] < one[0]["loss"]
    for mine, theirs in zip(one, two, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4) and len(mine) > 3, "the loss, and that of several bands"
    gain = json.loads((tmp_path / "one" / "gains.json").read_text())["loss"]
    assert gain["n"] == 2 and gain["value"] == pytest.approx(one[2]["loss"] - one[0]["loss"])
    widths = [Image.open(tmp_path / name / "samples" / "step_00000030.png").width for name in ("one", "two")]
    assert widths[1] == widths[0] + 2 * (32 + 2)  # its own prompts beside the trainer's
    assert "held-out loss" in (tmp_path / "one" / "index.html").read_text()
    with pytest.raises(AssertionError, match="--held-out: 6 of 6 samples"):
        run_world(1, entry, "sft", 30, 30, settings | {"out": tmp_path / "all", "held_out": 6}, deadline_s=DEADLINE_S)


def test_ranks_without_a_held_out_sample_wait_for_no_other(init, data, tmp_path):
    settings = {"init": init, "data": (data,), "batch_size": 4, "held_out": 1, "validate_every": 2, "validation": None}
    run_world(2, entry, "sft", 2, 2, settings | {"out": tmp_path}, deadline_s=DEADLINE_S)
    assert len((tmp_path / "held_out.jsonl").read_text().splitlines()) == 2


def test_training_on_data_that_are_still_being_made_is_training_on_the_whole(init, components, tmp_path, make_pictures):
    settings = {"init": init, "batch_size": 4, "validate_every": 0, "held_out": 0}
    raw, live = make_pictures(tmp_path / "raw", shards=3, each=5), tmp_path / "live-data"
    run_world(
        1, entry, "sft", 8, 3, settings | {"out": tmp_path / "live", "data": (live,), "raw": str(raw)},
        deadline_s=DEADLINE_S,
    )  # fmt: skip
    assert (live / "dataset.json").exists()
    run_world(1, entry, "sft", 8, 3, settings | {"out": tmp_path / "whole", "data": (live,)}, deadline_s=DEADLINE_S)
    assert_same_run(tmp_path / "live", tmp_path / "whole")
    rows = [json.loads(row) for row in (tmp_path / "live" / "speed.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and rows[0]["data_wait"] > 0 and any("samples_per_second/" in name for name in rows[0])
