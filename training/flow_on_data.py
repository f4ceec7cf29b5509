"""Flow matching on encoded data: what pretraining and supervised fine-tuning have in common."""

from typing import Any, Literal

from command_line import UserError
from data_pipeline.loader import EncodedDataset, Loader
from model.sampling.draw import Request
from training.flow_matching import VelocityMSE, samples_shown
from training.held_out import HeldOutHook, hold_out
from training.run_folder import RunFolder
from training.studio import Studio

HELD_OUT = 512
"""Samples that are held out at most where no number is given."""


class FlowOnData(VelocityMSE):
    """Trains on a data set but for `config.held_out` samples, on which the loss is measured instead.

    `config` has batch_size, max_tokens, condition_dropout, held_out, validate_every and loop. UserError if nothing is
    left to train on.
    """

    def __init__(
        self,
        config: Any,
        studio: Studio,
        dataset: EncodedDataset,
        density: Literal["logit-normal", "uniform", "mode"] = "logit-normal",
    ):
        super().__init__(density, condition_dropout=config.condition_dropout)
        self.config, self.studio, self.dataset, self.held = config, studio, dataset, None
        count = min(HELD_OUT, len(dataset) // 10) if config.held_out is None else config.held_out
        if count:
            try:
                self.dataset, self.held = hold_out(dataset, count)
            except ValueError as error:
                raise UserError(f"--held-out: {error}") from None

    def batches(self) -> Loader:
        config, engine = self.config, self.studio.engine
        return Loader(
            self.dataset, config.batch_size, engine.dp_rank, engine.dp_size, config.loop.seed, config.max_tokens
        )

    def shown(self) -> list[Request]:
        return samples_shown(self.dataset)

    def hooks(self, run: RunFolder) -> list[HeldOutHook]:
        """The loss on what is held out."""
        if self.held is None or not self.config.validate_every:
            return []
        config, objective = self.config, VelocityMSE(self.density, self.resolution_shift, condition_dropout=0.0)
        return [HeldOutHook(config.validate_every, run, objective, self.held, config.max_tokens, config.MEASURES_FIRST)]
