"""What algorithms that learn from their own pictures take. Imports no torch, for `--help`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from command_line import UserError
from training.cost.step import Work
from training.start import RunConfig, picture_side


@dataclass(frozen=True)
class RolloutConfig(RunConfig):
    prompts: Path | None = None
    """JSON lines {"prompt": ..., ...} to draw. Default: the shapes world's training prompts."""
    rewards: tuple[str, ...] = ("shapes_soft",)
    """What judges a picture, as NAME or NAME=WEIGHT: shapes, shapes_soft, ocr, remote(url=URL), or your own as
    FILE.py:CLASS."""
    prompts_per_update: int = 48
    group: int = 24
    """Pictures of each prompt, compared with each other (Flow-GRPO: 24 is stable, 12 and 6 collapse at scale)."""
    size_px: int | None = None
    """Side of the (square) pictures, a multiple of 16. Default: what --init was trained at."""
    sampling_steps: int = 10
    """Denoising steps of a picture in training."""
    cfg_scale: float = 4.0
    """Guidance while drawing; 1 for none."""
    advantage_std: Literal["group", "batch"] = "group"
    """What a reward's distance from its group's mean is divided by."""
    updates_per_rollout: int = 1
    """Updates made from the same pictures."""

    def completed(self) -> Self:
        for name, steps in (("steps", self.loop.steps), ("save-every", self.loop.save_every)):
            if steps % self.updates_per_rollout:
                raise UserError(
                    f"--{name} {steps} must be a multiple of --updates-per-rollout {self.updates_per_rollout}, so that "
                    "a resumed run is the same run"
                )
        if self.group < 2:
            raise UserError(f"--group {self.group}: pictures of a prompt are compared with each other, so 2 at least")
        config = super().completed()
        return replace(config, size_px=picture_side(config.size_px, config.source))

    def side_px(self) -> int:
        return self.size_px

    @property
    def sides(self) -> int:
        """Passes of the model for each velocity: guidance takes two."""
        return 2 if self.cfg_scale > 1 else 1

    def work(self) -> Work:
        """Every picture drawn, and each of its passes trained on once; the algorithm says what differs."""
        pictures, given = self.prompts_per_update * self.group, super().work()
        draws = pictures * self.sampling_steps * self.sides // self.updates_per_rollout
        return replace(given, samples=pictures, unit="pictures", draws=draws)

    def summary(self) -> str:
        return (
            f"{super().summary()}; {self.loop.steps} updates of {self.prompts_per_update} prompts of "
            f"{self.prompts or 'the shapes world'} x {self.group} pictures at {self.size_px} px"
        )
