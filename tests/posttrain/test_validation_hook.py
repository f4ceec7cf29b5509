"""Validation while training: the same pictures and scores from one process, from two, and after a resume."""

import json
from pathlib import Path

import numpy as np
from small_run import SIZE_PX, run_entry
from worlds import run_world


def validate(rank: int, components: Path, init: Path, out: Path) -> np.ndarray:
    """Pictures that the hook draws with the weights of `init`; their scores go to validation.jsonl."""
    from small_run import CONFIG

    from evaluation.validation import ShapesValidation
    from model.sampling.draw import Sampler
    from model.sampling.schedule import FixedSchedule
    from training.engine.config import EngineConfig
    from training.engine.step import Engine
    from training.hooks import ValidationHook
    from training.run_folder import RunFolder
    from training.studio import SharedGenerator, Studio

    engine = Engine(CONFIG, EngineConfig(), 1)
    engine.load_run(init)
    run = RunFolder(out, {}, engine.rank == 0)
    run.open(0)
    validation = ShapesValidation(n=5)
    generator = SharedGenerator(Studio(engine, components, 4096), validation.texts, Sampler(FixedSchedule(3)))
    ValidationHook(1, run, generator, validation, SIZE_PX)(engine, 0)
    pictures = generator.generate(validation.texts, [(SIZE_PX, SIZE_PX)] * 5, validation.seeds)
    run.close()
    engine.close()
    return np.stack(pictures)


def test_two_processes_share_the_pictures_of_one(components, init, tmp_path):
    (alone,) = run_world(1, validate, components, init, tmp_path / "one")
    both = run_world(2, validate, components, init, tmp_path / "two")
    for pictures in both:  # five pictures: one of the two ranks draws one more
        assert np.abs(pictures.astype(int) - alone).max() <= 1
    assert len(np.unique(alone.reshape(5, -1), axis=0)) == 5
    rows = [json.loads((tmp_path / name / "validation.jsonl").read_text()) for name in ("one", "two")]
    assert rows[0] == rows[1] and rows[0]["strict"] == 0


def test_a_resumed_run_validates_no_step_twice(components, init, tmp_path):
    def run(steps: int) -> list[int]:
        settings = dict(init=init, components=components, out=tmp_path / "grpo", group=2, prompts_per_update=1)
        run_world(1, entry, steps, settings, deadline_s=300)
        return [json.loads(r)["step"] for r in (tmp_path / "grpo" / "validation.jsonl").read_text().splitlines()]

    assert run(1) == [0, 1]
    with (tmp_path / "grpo" / "validation.jsonl").open("a") as file:
        file.write('{"step": 9, "strict": 1.0}\n')  # of a run that died before it saved step 9
    assert run(2) == [0, 1, 2]
    gains = json.loads((tmp_path / "grpo" / "gains.json").read_text())
    assert gains["strict"]["n"] == 3 and "What it gained" in (tmp_path / "grpo" / "index.html").read_text()


def entry(rank: int, steps: int, settings: dict) -> None:
    import evaluation.validation as validation

    validation.PROMPTS = 3
    few = "evaluation.validation:ShapesValidation"
    run_entry(rank, "flow_grpo", steps, 1, validate_every=1, validation=few, **settings)
