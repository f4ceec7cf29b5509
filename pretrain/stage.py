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
from training.flow_on_data import FlowOnData
from training.studio import Studio


class Pretraining(FlowOnData):
    """Flow matching on the encoded data of one resolution, or of several in --shares. UserError for data of another
    width, or of which none have the stage's resolution."""

    def __init__(self, config: StageConfig, studio: Studio):
        super().__init__(
            config, studio, density=config.density, density_mean=config.density_mean, density_std=config.density_std
        )
        dataset = self.whole
        parts = getattr(dataset, "parts", [dataset])
        if config.side_px() not in {part.fingerprint.resolution for part in parts}:
            raise UserError(
                f"{config.data[0]} was encoded at {dataset.fingerprint.resolution} px, stage {config.res} of "
                f"preset {config.preset} trains at {config.side_px()} px; produce it with --res {config.side_px()}"
            )
        if dataset.txt_empty.shape[-1] != config.model.joint_attention_dim:
            raise UserError(
                f"{config.data[0]} holds text states of width {dataset.txt_empty.shape[-1]}, preset "
                f"{config.preset} takes {config.model.joint_attention_dim}; encode it with that text encoder or choose "
                "another preset"
            )
