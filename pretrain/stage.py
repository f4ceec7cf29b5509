"""Pretrain one stage of the curriculum: flow matching at 256, 640 or 1328 pixels.

    torchrun --nproc-per-node 8 pretrain/stage.py --res 1328 --init runs/pretrain-640 --data DATA --components FOLDER

Run the same command again to go on. The defaults shown are those of the stage and preset given with --res, --preset.
"""

try:
    from pretrain.recipes import StageConfig
    from training.start import start
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

if __name__ == "__main__":
    start(StageConfig, "pretrain.stage:Pretraining")

from command_line import UserError
from data_pipeline.loader import EncodedDataset, Loader
from model.sampling.draw import Request
from training.flow_matching import VelocityMSE, samples_shown
from training.studio import Studio


class Pretraining(VelocityMSE):
    """Flow matching on the encoded data of one resolution. UserError for data of another width or resolution."""

    def __init__(self, config: StageConfig, studio: Studio):
        super().__init__(config.density, condition_dropout=config.condition_dropout)
        self.config, self.studio = config, studio
        self.dataset = EncodedDataset(config.data)
        if self.dataset.fingerprint.resolution != config.side_px():
            raise UserError(
                f"{config.data[0]} was encoded at {self.dataset.fingerprint.resolution} px, stage {config.res} of "
                f"preset {config.preset} trains at {config.side_px()} px; produce it with --res {config.side_px()}"
            )
        if self.dataset.txt_empty.shape[-1] != config.model.joint_attention_dim:
            raise UserError(
                f"{config.data[0]} holds text states of width {self.dataset.txt_empty.shape[-1]}, preset "
                f"{config.preset} takes {config.model.joint_attention_dim}; encode it with that text encoder or choose "
                "another preset"
            )

    def batches(self) -> Loader:
        config, engine = self.config, self.studio.engine
        return Loader(
            self.dataset, config.batch_size, engine.dp_rank, engine.dp_size, config.loop.seed, config.max_tokens
        )

    def shown(self) -> list[Request]:
        return samples_shown(self.dataset)
