"""Checkpoints: what they hold, in which layouts they load, and what happens to damaged ones."""

import dataclasses
import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mixed_batch import CONFIG, fill, samples
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from worlds import run_world

from model.mmdit import MMDiT
from training.engine.checkpoint import damage, list_checkpoints, read_weights, resolve


def make_engine(layout: tuple[int, int, bool] = (1, 1, False), config=CONFIG, **settings):
    from training.engine.config import EngineConfig, OptimizerConfig, ParallelConfig
    from training.engine.step import Engine

    optimizer = OptimizerConfig(lr=1e-2, eps=1e-4, warmup_steps=2)
    return Engine(config, EngineConfig(ParallelConfig(*layout), optimizer, ema_decay=0.5, **settings), total_steps=9)


def filled(engine):
    fill(engine.model)
    engine.weights_changed()
    return engine


def step(engine, epoch: int) -> dict[str, float]:
    from training.flow_matching import VelocityMSE
    from training.randomness import Randomness

    return engine.step(VelocityMSE(), [samples(epoch)[engine.dp_rank :: engine.dp_size]], Randomness(0))


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, as torch reads it."""
    reader = FileSystemReader(folder)
    sizes = {k: v for k, v in reader.read_metadata().state_dict_metadata.items() if hasattr(v, "size")}
    tensors = {k: torch.zeros(v.size, dtype=v.properties.dtype) for k, v in sizes.items()}
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def train_and_save(rank: int, folder: Path, layout: tuple[int, int, bool]) -> dict[str, float]:
    """Two steps, a checkpoint, and the metrics of one step more."""
    engine = filled(make_engine(layout))
    step(engine, 0), step(engine, 1)
    engine.save(folder, {"cursor": [1, "zwei"]})
    return step(engine, 2)


def load_and_save(rank: int, source: Path, target: Path, layouts: dict) -> dict[str, dict]:
    """Load in each layout, save again at once, and do one step."""
    metrics = {}
    for name, layout in layouts.items():
        engine = make_engine(layout)
        assert engine.load(source) == {"cursor": [1, "zwei"]} and engine.step_count == 2
        engine.save(target / name, {})
        metrics[name] = step(engine, 2)
    return metrics


def test_a_checkpoint_loads_in_any_layout(tmp_path: Path):
    source = tmp_path / "step_00000002"
    then = run_world(2, train_and_save, source, (2, 1, True))[0]
    whole = stored(source)
    layouts = {"tp2": (2, 1, False), "dp2": (1, 1, False), "cp2": (1, 2, False)}
    later = run_world(2, load_and_save, source, tmp_path, layouts)[0]
    later |= run_world(1, load_and_save, source, tmp_path, {"one": (1, 1, False)})[0]
    for name, metrics in later.items():
        assert same(stored(tmp_path / name), whole), name
        assert metrics == pytest.approx(then, rel=1e-5), name


def test_one_layout_resumes_bit_for_bit(tmp_path: Path):
    source = tmp_path / "step_00000002"
    then = run_world(1, train_and_save, source, (1, 1, False))[0]
    assert run_world(1, load_and_save, source, tmp_path, {"again": (1, 1, False)})[0]["again"] == then


def saved_before_the_first_step(rank: int, folder: Path) -> None:
    engine = filled(make_engine())
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        engine.save(folder, {})
    finally:
        torch.use_deterministic_algorithms(False)


def test_moments_before_the_first_step_are_zero(tmp_path: Path):
    run_world(1, saved_before_the_first_step, tmp_path / "step_00000000")
    moments = {k: v for k, v in stored(tmp_path / "step_00000000").items() if ".exp_avg" in k}
    assert moments and not any(v.any() for v in moments.values())


def room_to_load(rank: int) -> tuple[int, int, int]:
    """(bytes that a rank has ready to load optimizer state into, bytes of all of it, parameters cut by the border)."""
    from training.engine import device

    engine = filled(make_engine())
    with device.megatron_region():
        rooms = engine._saving._optimizer_room()["optimizer"]["param_state"]
    ready = sum(tensor.data.nbytes for parts in rooms.values() for tensor in parts.values())
    sizes = {n: p.numel() for n, p in engine.model.named_parameters() if p.requires_grad}
    cut = sum(12 * sizes[n] for n, own in engine.shards.masters().items() if own.numel() < sizes[n])
    return ready, 12 * sum(sizes.values()), cut


def test_a_rank_has_room_for_the_optimizer_state_that_it_updates_and_no_more():
    (a, whole, cut), (b, _, _) = run_world(2, room_to_load)
    assert a + b == whole + cut and cut < 0.1 * whole
    assert max(a, b) < 0.6 * whole


def test_read_weights_in_one_process(tmp_path: Path):
    run_world(2, train_and_save, tmp_path / "checkpoints" / "step_00000002", (2, 1, True))
    tensors = stored(tmp_path / "checkpoints" / "step_00000002")
    model = MMDiT(CONFIG)
    for ema in (True, False):
        config, weights = read_weights(tmp_path, ema)
        assert config == CONFIG
        model.load_state_dict(weights)  # every name, every shape
        for name, param in model.named_parameters():
            averaged = ema and param.requires_grad
            assert torch.equal(weights[name], tensors[f"ema.{name}" if averaged else f"model.{name}"])
    assert not torch.equal(tensors["ema.img_in.weight"], tensors["model.img_in.weight"])
    assert not dist.is_initialized()


def start_from(rank: int, source: Path, layout: tuple[int, int, bool]) -> dict[str, bool]:
    from training.engine.checkpoint import read_tensors

    engine = make_engine(layout)
    engine.load_run(source)
    ours = dict(engine.model.named_parameters())
    expected = filled(make_engine(layout)).model  # for its slices only
    from model.ops import local_shard

    with torch.no_grad():
        for name, tensor in read_tensors(resolve(source)).items():
            param = expected.get_parameter(name)
            param.copy_(local_shard(param, tensor))
    fresh = engine.frozen.averages["ema"].updates == 0 and engine.step_count == 0
    ema = engine.frozen.averages["ema"].average
    average = all(torch.equal(ema[n], w.float()) for n, w in engine.shards.masters().items())
    return {
        "weights": all(torch.equal(ours[n], p) for n, p in expected.named_parameters()),
        "fresh": fresh,
        "average": average,
    }


def test_start_from_the_average_of_another_run(tmp_path: Path):
    run_world(1, train_and_save, tmp_path / "step_00000002", (1, 1, False))
    for result in run_world(2, start_from, tmp_path, (2, 1, False)):
        assert result == {"weights": True, "fresh": True, "average": True}


def save_steps(rank: int, folder: Path, steps: int, keep: int) -> None:
    engine = filled(make_engine())
    for i in range(steps):
        step(engine, i)
        engine.save_step(folder, {"step": i + 1}, keep)


def resume(rank: int, folder: Path) -> tuple:
    """(extra or error, step, lines printed)"""
    engine = make_engine()
    with redirect_stdout(StringIO()) as out:
        try:
            result = engine.resume(folder)
        except ValueError as error:
            result = str(error)
    return result, engine.step_count, out.getvalue().splitlines()


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose(name: str):
    def damage_by_loss(folder: Path) -> None:
        (folder / name).unlink()

    return damage_by_loss


def edit_the_step(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "step": 100}))


def garble_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b'{"state.json": [1, \xff')


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path):
    run_world(1, save_steps, tmp_path / "run", 3, 2)
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step_00000003", "step_00000002"]
    assert run_world(1, resume, tmp_path / "run") == [({"step": 3}, 3, [])]
    losses = map(lose, (".metadata", "common.pt", "manifest.json", "state.json", "__0_0.distcp"))
    for way in (truncate, flip_a_bit, edit_the_step, garble_the_manifest, *losses):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        way(tmp_path / "copy" / "step_00000003")
        assert damage(tmp_path / "copy" / "step_00000003")
        assert resolve(tmp_path / "copy").name == "step_00000002"
        if way in (flip_a_bit, garble_the_manifest):
            [(extra, step_count, [line])] = run_world(1, resume, tmp_path / "copy")
            assert extra == {"step": 2} and step_count == 2 and "step_00000003 is damaged" in line
        shutil.rmtree(tmp_path / "copy")


def test_nothing_intact_is_an_error_not_a_fresh_start(tmp_path: Path):
    assert run_world(1, resume, tmp_path) == [(None, 0, [])]
    run_world(1, save_steps, tmp_path, 1, 2)
    truncate(tmp_path / "step_00000001")
    [(message, _, _)] = run_world(1, resume, tmp_path)
    assert "is damaged; remove them to start over" in message
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged"):
        read_weights(tmp_path)


def test_leftovers_of_a_killed_save_are_no_checkpoint(tmp_path: Path):
    (tmp_path / ".tmp-step_00000009").mkdir()
    (tmp_path / ".tmp-step_00000009" / "state.json").write_text("{")
    assert run_world(1, resume, tmp_path) == [(None, 0, [])]
    run_world(1, save_steps, tmp_path, 1, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001"]


def load_into_another(rank: int, folder: Path) -> str:
    engine = make_engine(config=dataclasses.replace(CONFIG, num_layers=3, zero_cond_t=False))
    with pytest.raises(ValueError) as error:
        engine.load(folder)
    return str(error.value)


def test_a_checkpoint_of_another_model_names_the_fields(tmp_path: Path):
    run_world(1, save_steps, tmp_path, 1, 2)
    [message] = run_world(1, load_into_another, tmp_path / "step_00000001")
    assert "num_layers is 2 there, 3 here; zero_cond_t is True there, False here" in message
    assert "\n" not in message
