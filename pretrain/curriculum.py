"""Pretrain all stages of the curriculum, one after the other, each from the finished run of the one before.

    torchrun --nproc-per-node 8 pretrain/curriculum.py --data DATA-256 DATA-640 DATA-1328 --components FOLDER
    python pretrain/curriculum.py --config pretrain/curricula/text-first.toml

Run the same command again to go on; stages that are finished are not run again. The stages are those of
pretrain/recipes.py, changed as --config says (docs/curriculum.md): what pretrain/stage.py runs one by one.
"""

try:
    from pretrain.recipes import CurriculumConfig
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

import gc
import os
from dataclasses import replace
from pathlib import Path

from command_line import UserError, flag, load_named, run
from pretrain.before import samples_seen, steps_done
from pretrain.recipes import StageConfig, likely_preset
from training.start import train_once


def main(config: CurriculumConfig) -> None:
    stages = config.stage_configs()
    if config.data:
        stages = [stage if stage.data else replace(stage, data=own_data(stage, config.data)) for stage in stages]
    checked = [replace(stage, dry_run=True).completed() for stage in stages]  # also those whose turn comes in weeks
    if config.dry_run:
        print("\n\n".join(stage.plan() for stage in checked))
        return
    from training.engine import device

    algorithm = load_named("pretrain.stage:Pretraining")
    try:
        for stage in stages:
            if (done := steps_done(stage.out)) and done >= stage.loop.steps:
                seen = samples_seen(stage.out, done)
                say(f"stage {stage.res} is finished: {stage.out} (step {done:,}, {seen:,} samples seen)")
            else:
                if train_once(stage.completed(), algorithm, stage.init):
                    raise KeyboardInterrupt
                gc.collect()  # the next stage needs the memory
    finally:
        device.stop()


def own_data(stage: StageConfig, data: tuple[Path, ...]) -> tuple[Path, ...]:
    """The folders that have a resolution of the stage. UserError where one has none."""
    from data_pipeline.dataset import read_fingerprint

    sides = {folder: read_fingerprint(folder, growing=True).resolution for folder in data}
    for side in stage.sides_px():
        if side not in sides.values():
            raise UserError(f"stage {stage.res} trains at {side} px, and nothing in --data was encoded at that: "
                            f"produce it with --res {side}")  # fmt: skip
    return tuple(folder for folder in data if sides[folder] in stage.sides_px())


def say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def defaults(argv: list[str]) -> CurriculumConfig:
    return CurriculumConfig(preset=flag(argv, "--preset") or likely_preset(argv))


if __name__ == "__main__":
    run(main, defaults)
