"""Pretrain one stage of the curriculum: flow matching at 256, 640 or 1328 pixels.

    torchrun --nproc-per-node 8 pretrain/stage.py --res 1328 --data DATA --components FOLDER

A stage starts from the finished run of the one before. Run the same command again to go on; pretrain/curriculum.py runs
all stages. The defaults shown are those of the stage and preset given with --res, --preset.
"""

try:
    from pretrain.recipes import StageConfig
    from training.start import start
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

if __name__ == "__main__":
    start(StageConfig, "pretrain.stage:Pretraining")

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from command_line import UserError
from data_pipeline.class_order import ByClass, Classes
from data_pipeline.dataset import read_fingerprint
from data_pipeline.live import is_live
from data_pipeline.order import Order
from training.cost.step import sample_flops
from training.cost.weights import Weights
from training.flow_on_data import FlowOnData
from training.studio import Studio


class Pretraining(FlowOnData):
    """Flow matching on the encoded data of one resolution, of those in a recipe's draws, or of several in --shares.

    UserError for data of another width, or of which none have the stage's resolution, or not what is to be drawn.
    """

    def __init__(self, config: StageConfig, studio: Studio):
        if config.draws and (config.raw is not None or any(is_live(folder) for folder in config.data)):
            raise UserError(
                "the recipe's shares and least scores are of finished data: produce these first, or draw --natural"
            )
        super().__init__(
            config, studio, density=config.density, density_mean=config.density_mean, density_std=config.density_std,
            shift=config.shift,
        )  # fmt: skip
        dataset = self.whole
        found = {part.fingerprint.resolution for part in getattr(dataset, "parts", [dataset])}
        for side in config.sides_px():
            if side not in found:
                raise UserError(
                    f"{config.data[0]} was encoded at {dataset.fingerprint.resolution} px, stage {config.res} of "
                    f"preset {config.preset} trains at {side} px; produce it with --res {side}"
                )
        if dataset.txt_empty.shape[-1] != config.model.joint_attention_dim:
            raise UserError(
                f"{config.data[0]} holds text states of width {dataset.txt_empty.shape[-1]}, preset "
                f"{config.preset} takes {config.model.joint_attention_dim}; encode it with that text encoder or choose "
                "another preset"
            )
        self.classes = self._classes() if config.draws else []
        """Of each resolution, where a recipe says what is drawn."""

    def groups(self) -> list[tuple[Path, ...]]:
        """Folders of --data by resolution, in the order of the recipe's."""
        config = self.config
        if len(config.sides_px()) == 1:
            return super().groups()
        sides = {folder: read_fingerprint(folder).resolution for folder in config.data}
        groups = [tuple(folder for folder in config.data if sides[folder] == side) for side in config.sides_px()]
        if missing := [side for side, group in zip(config.sides_px(), groups, strict=True) if not group]:
            raise UserError(f"nothing in --data was encoded at {missing[0]} px; produce it with --res {missing[0]}")
        return groups

    def order(self) -> Order | None:
        """Classes in the recipe's shares, and resolutions in those of compute."""
        if not self.classes:
            return super().order()
        config = self.config
        by_tokens = config.batch_tokens is not None
        return ByClass(
            self.classes, config.loop.seed, config.loop.steps * (config.batch_tokens or config.batch_size),
            shares=tuple(config.sides_px().values()),
            cost=flops_of([classes.dataset for classes in self.classes], config),
            tokens=(lambda part, index: int(self.classes[part].dataset.tokens[index])) if by_tokens else None,
        )  # fmt: skip

    def _classes(self) -> list[Classes]:
        config = self.config
        parts: list[Any] = getattr(self.dataset, "parts", [self.dataset])
        names = [" and ".join(map(str, group)) for group in self.groups()]
        found = [Classes(part, config.draws, name) for part, name in zip(parts, names, strict=True)]
        if self.studio.engine.rank == 0:
            for name, classes in zip(names, found, strict=True):
                print(f"draws from {name}: {'; '.join(classes.lines())}")
        return found


def flops_of(parts: Sequence[Any], config: StageConfig) -> Callable[[int, int], float]:
    """FLOPs of sample `index` of a part, forward and backward, as the plan counts them; references count as text."""
    weights, again = Weights(config.model, config.engine.lora), config.engine.recompute == "block"
    sizes = [(part.column("height"), part.column("width"), part.tokens) for part in parts]

    def flops(part: int, index: int) -> float:
        height, width, tokens = (int(column[index]) for column in sizes[part])
        img = height * width // config.model.patch_size**2
        forward, backward, blocks = sample_flops(weights, img, tokens - img)
        return float(forward + backward + again * blocks)

    return flops
