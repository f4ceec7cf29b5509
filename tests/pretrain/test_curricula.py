"""The recipes of pretrain/curricula: each parses, names what it says, and differs from the others in that alone."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from stage_runs import ROOT, curriculum, make_data

from command_line import from_dict, read_toml
from data_pipeline.draws import Draws
from pretrain.mixing import tokens_and_flops
from pretrain.recipes import CurriculumConfig, StageConfig

FOLDER = ROOT / "pretrain" / "curricula"


def stages(name: str) -> list[StageConfig]:
    config = from_dict(CurriculumConfig, read_toml(FOLDER / f"{name}.toml"), CurriculumConfig(), name)
    return [stage.completed_draws() for stage in config.stage_configs()]


def test_rope_ablations_differ_in_nothing_else():
    whole = stages("stages")
    assert [s.res for s in whole] == [256, 640, 1328] and {s.model.rope for s in whole} == {"msrope"}
    assert all(set(s.sides_px()) == {s.side_px()} for s in whole)
    for scheme in ("text-first", "scaling"):
        others = stages(scheme)
        assert {s.model.rope for s in others} == {scheme} and {s.out.parent.name for s in others} == {scheme}
        same = dict(rope="msrope", init=None)
        assert [replace(s, **same, out=None) for s in others] == [replace(s, **same, out=None) for s in whole]


def test_the_last_resolution_alone_has_the_compute_of_all_three():
    whole, (last,) = stages("stages"), stages("last-only")
    flops = lambda s: s.loop.steps * s.batch_size * tokens_and_flops(s.side_px(), s.model)[1]  # noqa: E731
    assert flops(last) == pytest.approx(sum(map(flops, whole)), rel=0.005)
    same = dict(loop=None, init=None, out=None)
    assert last.init == Path("random") and replace(last, **same) == replace(whole[-1], **same)


def test_the_example_names_every_field_and_is_in_the_docs():
    text = (FOLDER / "example.toml").read_text()
    for name in (*(f.name for f in fields(Draws)), "lr", "steps", "batch_size", "batch_tokens", "ema_half_life",
                 "density", "density_mean", "density_std", "shift", "condition_dropout", "rope"):  # fmt: skip
        assert f"{name} = " in text
    assert text.strip() in (ROOT / "docs" / "curriculum.md").read_text()
    first, second, third = stages("example")
    assert (
        first.draws.source["real"] == ((0.0, 0.3), (1.0, 0.35)) and second.batch_tokens == 1600 and second.shift == 1.5
    )
    assert third.loop.steps == 10 and third.draws.moves


@pytest.mark.slow
def test_other_positions_are_trained(tmp_path: Path):
    data = make_data(tmp_path / "data", 64)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'out = "{tmp_path}"\ndata = ["{data}"]\n[common]\nbatch_size = 2\nrope = "text-first"\n'
        "[stages.256]\nloop = { steps = 1 }\n"
    )
    status, _, err = curriculum("--config", recipe)
    assert status == 0, err
    [state] = tmp_path.glob("pretrain-256/checkpoints/*/state.json")
    assert json.loads(state.read_text())["model"]["rope"] == "text-first"
