"""Supervised fine-tuning: flow matching on curated pictures, from a pretrained model.

    torchrun --nproc-per-node 8 posttrain/sft.py --init runs/pretrain-1328 --data DATA

The loss is pretraining's. Run the same command again to go on.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

try:
    import tyro

    from command_line import UserError
    from training.data_config import DataConfig
    from training.demo_data import demo_data, encoded_folder
    from training.engine.config import EngineConfig
    from training.loop import LoopConfig
    from training.source import BASE, look
    from training.start import optimizer, start, toy_optimizer
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config(DataConfig):
    data: tuple[Path, ...] = ()
    """Encoded data sets (of data_pipeline/produce.py), or a single one that is still being made. Default: what --init
    was trained on; for the shipped base, the demo's, made if missing."""
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = field(default_factory=lambda: LoopConfig(10_000, save_every=500))
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=lambda: optimizer(lr=2e-5))

    NAME: ClassVar = "sft"
    TOY: ClassVar = dict(batch_size=32, loop=LoopConfig(50, save_every=25), engine=toy_optimizer(1e-4))

    def completed(self) -> "Config":
        self.require_sources()
        config = super().completed()
        data = config.data or tuple(look(config.init).settings.get("data", ()))
        if not data and config.init.resolve() == BASE:
            side = config.side_px()
            data = (encoded_folder(side) if config.dry_run else demo_data(side),)
        if not data:
            raise UserError(f"{config.init} names no data; give --data: encoded shards of data_pipeline/produce.py")
        return replace(config, data=data)

    def summary(self) -> str:
        data = ", ".join(map(str, self.data))
        return f"{super().summary()}; {self.loop.steps} steps of {self.batch_size} samples of {data}"


if __name__ == "__main__":
    start(Config, "posttrain.sft:SFT")

from posttrain.page import Paged
from training.flow_on_data import FlowOnData
from training.studio import Studio


class SFT(Paged, FlowOnData):
    """Flow matching on the data of a config."""

    def __init__(self, config: Config, studio: Studio):
        super().__init__(config, studio, mixed_resolutions=True)
