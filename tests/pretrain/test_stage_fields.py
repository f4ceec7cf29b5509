"""Each field of a stage does what it says: to what is drawn, to its noise, or to how the model learns of it."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from command_line import UserError
from model.config import PRESETS
from model.flow import mode_density
from pretrain.recipes import STAGES, StageConfig, recipe
from training.cost.step import sample_flops
from training.cost.weights import Weights
from training.loop import LoopConfig
from training.randomness import Randomness

sys.path.insert(0, str(Path(__file__).parents[1] / "data_pipeline"))
import class_data  # noqa: E402

STEPS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Data sets at 64 and 128 px, as the tiny preset's stages 256 and 1328 take them."""
    made = []
    for i in range(120):
        source, text = ("text", "photo")[i % 2], ("none", "words", "sentences")[i % 3]
        scores = {"clip": i / 128}
        made.append(class_data.record(text, source, scores=scores, domain=("nature", "people")[i // 2 % 2]))
    root = tmp_path_factory.mktemp("fields")
    shapes = {64: lambda i: (8, 8, 4 + i % 9), 128: lambda i: (16, 16 + 2 * (i % 2), 4 + i % 20)}
    return {
        side: class_data.write(root / str(side), made, resolution=side, shape=shape, width=128)
        for side, shape in shapes.items()
    }


def seen(folders: dict[int, Path], config: StageConfig, stop_at: int | None = None) -> dict[str, list]:
    """What a trainer of `config` would give the model in its steps: each sample's key, record, sigma, text, size.

    It is another trainer that goes on after `stop_at` steps."""
    from pretrain.stage import Pretraining

    engine = SimpleNamespace(rank=1, dp_rank=0, dp_size=1, any_rank=lambda flag: False)
    trainer = Pretraining(replace(config, data=tuple(folders.values())), SimpleNamespace(engine=engine))
    batches, found = trainer.batches(), {"steps": [], "sigma": [], "dropped": []}
    for at in range(config.loop.steps):
        if at == stop_at:
            cursor = json.loads(json.dumps(batches.state_dict()))
            batches.close()
            batches = Pretraining(trainer.config, trainer.studio).batches()
            batches.load_state_dict(cursor)
        samples = [s for group in next(batches) for s in group]
        inputs, _ = trainer.prepare(samples, Randomness(0), 16)
        found["steps"].append(samples)
        found["sigma"] += inputs.sigma.tolist()
        found["dropped"] += [len(s.txt) != shape.txt for s, shape in zip(samples, inputs.pack.shapes, strict=True)]
    batches.close()
    return found


def config(**changes: object) -> StageConfig:
    return replace(recipe(256), batch_size=20, loop=LoopConfig(STEPS), out=Path("none"), **changes)


def drawn(**tables: object) -> StageConfig:
    return config(draws=replace(StageConfig().draws, **tables))


@pytest.fixture(scope="module")
def plain(folders: dict[int, Path]) -> dict[str, list]:
    return seen({64: folders[64]}, config())


def flat(found: dict[str, list]) -> list:
    return [s for step in found["steps"] for s in step]


def test_text_source_domain_and_minimum_choose_what_is_drawn(folders: dict[int, Path], plain: dict[str, list]):
    one = {64: folders[64]}
    checks = {
        "text": ({"none": 1}, lambda meta: "lines" not in meta),
        "source": ({"real": 1}, lambda meta: meta["source"] == "photo"),
        "domain": ({"people": 1}, lambda meta: meta["domain"] == "people" or meta["source"] == "text"),
        "minimum": ({"clip": 0.5}, lambda meta: meta["scores"]["clip"] >= 0.5),
    }
    for table, (curves, holds) in checks.items():
        assert all(holds(s.meta) for s in flat(seen(one, drawn(**{table: curves}))))
        assert not all(holds(s.meta) for s in flat(plain))
    held = seen(one, replace(drawn(text={"none": 1}), held_out=30))
    assert len({s.key for s in flat(held)}) < 40 and all("lines" not in s.meta for s in flat(held))
    everything = seen(one, replace(drawn(text={"none": 1}), natural=True).completed_draws())
    assert [s.key for s in flat(everything)] == [s.key for s in flat(plain)]


@pytest.mark.parametrize("batch", [{}, {"batch_tokens": 480}], ids=["samples", "tokens"])
def test_curves_are_over_the_length_of_the_stage(folders: dict[int, Path], batch: dict):
    """Words grow from none to all of what is drawn, also where a run is interrupted in the middle."""
    stage = replace(drawn(text={"none": [[0, 1], [1, 0]], "words": [[0, 0], [1, 1]]}), **batch)
    steps = seen({64: folders[64]}, stage)["steps"]
    found, done, words = [s for step in steps for s in step], 0, 0
    for step in steps:
        done, words = done + len(step), words + sum("lines" in sample.meta for sample in step)
        assert words == pytest.approx(done**2 / len(found) / 2, abs=3)
    again = flat(seen({64: folders[64]}, stage, stop_at=STEPS // 3))
    assert [s.key for s in again] == [s.key for s in found]
    other = flat(seen({64: folders[64]}, replace(stage, loop=LoopConfig(STEPS, seed=1))))
    assert [s.key for s in other] != [s.key for s in found]


def test_density_and_shift_move_the_noise(folders: dict[int, Path], plain: dict[str, list]):
    one, normal = {64: folders[64]}, np.array(plain["sigma"])
    logit = lambda sigma: np.log(sigma / (1 - np.array(sigma)))  # noqa: E731
    moved = {
        "density_mean": (seen(one, config(density_mean=1.0)), logit(normal) + 1),
        "density_std": (seen(one, config(density_std=2.0)), None),
        "shift": (seen(one, config(shift=1.0)), None),
        "density": (seen(one, config(density="uniform")), None),
    }
    assert logit(moved["density_mean"][0]["sigma"]) == pytest.approx(moved["density_mean"][1], abs=1e-3)
    bare = logit(moved["shift"][0]["sigma"])  # without a shift: a standard normal
    assert bare.mean() == pytest.approx(0, abs=0.2) and bare.std() == pytest.approx(1, abs=0.15)
    assert logit(seen(one, config(shift=3.0))["sigma"]) == pytest.approx(bare + np.log(3), abs=1e-3)
    assert np.std(logit(moved["density_std"][0]["sigma"])) == pytest.approx(2 * bare.std(), rel=1e-3)
    assert not np.allclose(moved["density"][0]["sigma"], normal)
    uniform = np.array(seen(one, config(density="uniform", shift=1.0))["sigma"])
    mode = np.array(seen(one, config(density="mode", shift=1.0))["sigma"])
    assert mode == pytest.approx(mode_density(torch.tensor(uniform)).numpy(), abs=1e-6)
    assert not np.allclose(mode, uniform)


def test_condition_dropout(folders: dict[int, Path], plain: dict[str, list]):
    often = seen({64: folders[64]}, config(condition_dropout=0.9))["dropped"]
    assert np.mean(often) == pytest.approx(0.9, abs=0.08) and np.mean(plain["dropped"]) == pytest.approx(0.1, abs=0.08)


def test_batch_in_samples_or_tokens(folders: dict[int, Path], plain: dict[str, list]):
    assert {len(step) for step in plain["steps"]} == {20}
    steps = seen({64: folders[64]}, config(batch_tokens=600))["steps"]
    tokens = [sum(len(s.txt) + 16 for s in step) for step in steps]
    assert max(abs(n - 600) for n in tokens) <= 14 and {len(step) for step in steps} != {20}
    assert config(batch_tokens=400).work().samples == 400 // (16 + 24)
    assert config(batch_tokens=400).samples_a_step() == 10


def test_half_life_of_the_average():
    decay = config(ema_half_life=200).with_average().engine.ema_decay
    assert decay ** (200 / 20) == pytest.approx(0.5)  # so many steps of 20
    assert StageConfig.defaults(["--preset", "qwen-image", "--ema-decay", ".9"]).ema_half_life is None
    assert StageConfig.defaults(["--preset", "qwen-image"]).with_average().engine.ema_decay == pytest.approx(
        0.5 ** (4096 / 2e7)
    )


def test_resolutions_get_equal_compute_unless_told_otherwise(folders: dict[int, Path]):
    weights = Weights(PRESETS["tiny"])

    def shares(**resolutions: object) -> np.ndarray:
        spent = np.zeros(2)
        stage = replace(drawn(resolutions=resolutions, text={"none": 1, "words": 1}), res=1328, loop=LoopConfig(40))
        for sample in flat(seen(folders, stage)):
            img = sample.latent.shape[-1] * sample.latent.shape[-2] // 4
            forward, backward, _ = sample_flops(weights, img, len(sample.txt))
            spent[int(img > 16)] += forward + backward
        return spent / spent.sum()

    assert shares(**{"256": 1, "1328": 1}) == pytest.approx([0.5, 0.5], abs=0.01)
    mixed = replace(drawn(resolutions={"256": 1, "1328": 1}), res=1328)
    small, large = (sum(sample_flops(weights, img, 24)[:2]) for img in (16, 64))
    assert mixed.work().samples == round(20 * 2 / (1 + large / small))  # samples of two sizes, as ones of the larger
    assert shares(**{"256": 1, "1328": 3}) == pytest.approx([0.25, 0.75], abs=0.01)


def test_a_sample_too_long_is_refused_at_the_start_of_a_mixed_stage(folders: dict[int, Path]):
    mixed = replace(drawn(resolutions={"256": 1, "1328": 1}), res=1328, max_tokens=80)
    with pytest.raises(ValueError, match="tokens, a microbatch at most 80"):
        seen(folders, mixed)


def test_a_resolution_without_data_is_named(folders: dict[int, Path]):
    stage = replace(drawn(resolutions={"256": 1, "640": 1}), res=640)
    with pytest.raises(UserError, match="nothing in --data was encoded at 96 px"):
        seen(folders, stage)
    with pytest.raises(UserError, match="there is no stage 512"):
        drawn(resolutions={"512": 1}).sides_px()


def test_data_that_are_still_being_made_have_no_classes(tmp_path: Path):
    (tmp_path / "live.json").write_text("{}")
    for folder, raw in ((tmp_path, None), (tmp_path / "new", "raw")):
        with pytest.raises(UserError, match="produce these first, or draw --natural"):
            seen({64: folder}, replace(drawn(text={"none": 1}), raw=raw, components=tmp_path))
    assert not (tmp_path / "new").exists()  # nobody has begun to make it


def test_the_large_recipe_names_every_field():
    for res, stage in STAGES.items():
        draws = stage.draws
        assert draws.text and draws.source and draws.domain and draws.minimum and stage.ema_half_life
        assert set(stage.sides_px()) == {res}
        shown = draws.text.get("paragraphs", ((0.0, 0.0),))[-1][1]
        assert (shown > 0) == (res > 256)
    rates = [stage.engine.optimizer.lr for stage in STAGES.values()]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 3
    assert torch.tensor([s.loop.steps for s in STAGES.values()]).diff().lt(0).all()


def test_a_run_keeps_in_mind_what_it_began_to_hold_out(folders: dict[int, Path], tmp_path: Path):
    from pretrain.stage import Pretraining

    engine = SimpleNamespace(rank=0, dp_rank=0, dp_size=1, any_rank=lambda flag: flag)
    run = SimpleNamespace(writes=True, path=tmp_path, checkpoints=tmp_path / "checkpoints")

    def held(asked: int | None = None) -> int:
        """How many samples are held out by a trainer whose run is here."""
        given = replace(config(held_out=asked, validate_every=0), data=(folders[64],), out=tmp_path)
        trainer = Pretraining(given, SimpleNamespace(engine=engine))
        trainer.hooks(run)
        return 0 if trainer.held is None else len(trainer.held)

    assert [held(), held(5), held()] == [2, 5, 5]
    (run.checkpoints / "step_00000001").mkdir(parents=True)
    assert [held(7), held()] == [7, 5]  # the loader refuses to go on with 7
