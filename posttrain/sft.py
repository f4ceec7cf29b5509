"""Supervised fine-tuning: flow matching on curated pictures, from a pretrained model.

    torchrun --nproc-per-node 8 posttrain/sft.py --init runs/pretrain-1328 --data DATA
    python posttrain/sft.py --init Qwen/Qwen-Image --pictures FOLDER --lora-rank 32

The loss is pretraining's. With --lora-rank adapters are trained, and the weights stay as they are. Run the same command
again to go on.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

try:
    import tyro

    from command_line import UserError
    from model.config import MMDiTConfig
    from training.data_config import DataConfig
    from training.demo_data import demo_data, encoded_folder
    from training.engine.config import EngineConfig
    from training.loop import LoopConfig
    from training.own_pictures import encode_pictures, is_encoded_from
    from training.source import BASE, TOY_PARAMETERS, look
    from training.start import TOY_VALIDATION, optimizer, picture_side, start, toy_optimizer
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config(DataConfig):
    data: tuple[Path, ...] = ()
    """Encoded data sets (of data_pipeline/produce.py), or a single one that is still being made. Default: what --init
    was trained on; for the shipped base, the demo's, made if missing."""
    pictures: Path | None = None
    """In place of --data: a folder of pictures with captions (NAME.txt beside each), which are encoded first."""
    skip_bad: bool = False
    """Leave out of --pictures what cannot be used."""
    size_px: int | None = None
    """Side of the square whose area --pictures get, a multiple of 16. Default: what --init was trained at."""
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = field(default_factory=lambda: LoopConfig(10_000, save_every=500))
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=lambda: optimizer(lr=2e-5))

    NAME: ClassVar = "sft"
    TOY: ClassVar = dict(batch_size=32, loop=LoopConfig(50, save_every=25), engine=toy_optimizer(1e-4))

    def for_adapters(self, model: MMDiTConfig) -> "Config":
        config = super().for_adapters(model)
        if model.num_parameters < TOY_PARAMETERS:
            return replace(config, loop=replace(config.loop, steps=200))
        return replace(config, batch_size=4, max_tokens=8192, loop=LoopConfig(1000, save_every=250))

    def completed(self) -> "Config":
        self.require_sources()
        config = super().completed()
        if self.pictures is not None:
            return self.with_pictures(config)
        if self.size_px is not None:
            raise UserError("--size-px goes with --pictures; encoded data have their size")
        data = config.data or tuple(look(config.init).settings.get("data", ()))
        if not data and config.init.resolve() == BASE:
            side = config.side_px()
            data = (encoded_folder(side) if config.dry_run else demo_data(side),)
        if not data:
            raise UserError(f"{config.init} names no data; give --data: encoded shards of data_pipeline/produce.py")
        return replace(config, data=data)

    def with_pictures(self, config: "Config") -> "Config":
        """The config with the user's pictures encoded. UserError for what does not go with them."""
        if config.raw is not None or config.data and not is_encoded_from(config.pictures, config.data):
            raise UserError("--pictures stands in place of --data and --raw: give one of them")
        side = picture_side(config.size_px, config.source)
        encoded = config.out / "data" / f"encoded-{side}"
        if not config.dry_run:
            more = ("--skip-bad",) if config.skip_bad else ()
            encoded = encode_pictures(config.pictures, config.components, side, config.out / "data", *more)
        validation = None if config.validation == TOY_VALIDATION else config.validation  # which knows no such pictures
        return replace(config, data=(encoded,), size_px=side, validation=validation)

    def side_px(self) -> int:
        return self.size_px or super().side_px()

    def summary(self) -> str:
        data = ", ".join(map(str, self.data))
        size = f"{self.batch_size} samples" if self.batch_tokens is None else f"{self.batch_tokens} tokens"
        return f"{super().summary()}; {self.loop.steps} steps of {size} of {data}"


if __name__ == "__main__":
    start(Config, "posttrain.sft:SFT")

from posttrain.page import Paged
from training.flow_on_data import FlowOnData
from training.studio import Studio


class SFT(Paged, FlowOnData):
    """Flow matching on the data of a config."""

    def __init__(self, config: Config, studio: Studio):
        super().__init__(config, studio, mixed_resolutions=True)
