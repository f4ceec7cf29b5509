"""Flow matching on encoded data: what pretraining and supervised fine-tuning have in common."""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import UserError
from data_pipeline.dataset import EncodedDataset, MixedData
from data_pipeline.live import LIVE, LiveDataset, is_live, open_dataset
from data_pipeline.loader import Loader
from data_pipeline.order import AsReady, ByShard, Mixture, Order
from files import write_json
from model.sampling.draw import Request
from training.data_config import DataConfig
from training.encoded_with import require_encoded_with
from training.engine.checkpoint import list_checkpoints
from training.flow_matching import VelocityMSE, samples_shown
from training.held_out import HeldOutHook, flow_loss, hold_out
from training.run_folder import RunFolder
from training.studio import Studio

if TYPE_CHECKING:
    from data_pipeline.producers import Producers
    from training.engine.step import Engine

HELD_OUT = 512
"""Samples that are held out at most where no number is given."""
HELD_OUT_NOTE = "held_out.json"
"""File of a run that says how many samples it began to hold out."""
SEEN_S = 90.0
"""Longest time for a file that one machine has written to be seen on another."""
SEAL_S = 600.0
"""Longest time for producers to make a data set of finished shards."""
SAID = 20
"""Broken samples that are named at the start."""
SHOWN = 8
"""Samples, the first ones, whose prompts are drawn."""


def start_producers(config: DataConfig, engine: "Engine") -> "Producers | None":
    """The producers of config.raw, on each node's first process (of Ray's, on the first of all); None elsewhere.

    Returns when the plan is theirs, on all ranks.
    """
    from data_pipeline.producers import Producers, plan_stamp, wait_for_plan
    from data_pipeline.production import Production

    if config.components is None:
        raise UserError("--raw needs --components, to encode it by")
    (out,), started = config.data, None
    before = plan_stamp(out) if engine.rank == 0 else None
    engine.any_rank(False)  # it has looked
    here = "RANK" if config.producers.startswith("ray") else "LOCAL_RANK"
    if os.environ.get(here, os.environ.get("RANK", "0")) == "0":
        started = Producers(
            config.producers,
            Production(config.raw, components=config.components, res=config.side_px(), out=out, ahead=config.ahead),
        )
    if engine.rank == 0:
        wait_for_plan(out, before, lambda: started and started.problem)
    engine.any_rank(False)
    return started


def agreed_live(engine: "Engine", folder: Path) -> bool:
    """Whether a folder is taken for a growing set, on all ranks alike: rank 0 has looked, and a file may come late.

    Where it is whole for rank 0, the others wait until they see that.
    """
    grows = engine.any_rank(engine.rank == 0 and is_live(folder))
    sign, end = folder / (LIVE if grows else "dataset.json"), time.monotonic() + SEEN_S
    while engine.rank and not sign.exists() and time.monotonic() < end:
        time.sleep(0.5)
    return grows


class FlowOnData(VelocityMSE):
    """Trains on a data set but for `config.held_out` samples, on which the loss is measured instead; `objective` are
    fields of `VelocityMSE`.

    UserError if nothing is left to train on.
    """

    def __init__(
        self,
        config: DataConfig,
        studio: Studio,
        mixed_resolutions: bool = False,
        **objective: Any,
    ):
        super().__init__(condition_dropout=config.condition_dropout, **objective)
        self.producers = None if config.raw is None else start_producers(config, studio.engine)
        self.config, self.studio = config, studio
        ended = lambda: self.producers and self.producers.problem  # noqa: E731
        grows = {folder: agreed_live(studio.engine, folder) for folder in config.data}
        groups = self.groups()
        if config.shares or len(groups) > 1:
            parts = [open_dataset(group, problem=ended, live=grows.__getitem__) for group in groups]
            self.whole = MixedData(parts, Mixture.SOURCE)
        else:
            self.whole = open_dataset(config.data, mixed_resolutions, ended, grows.__getitem__)
        if studio.engine.rank == 0:
            for problem in self.whole.problems[:SAID]:
                print(f"passed over: {problem}", file=sys.stderr)
            if config.components is not None:
                require_encoded_with(config.components, config.data)
        self.dataset, self.held = self.whole, None
        """What is trained on, and what is held out of it."""
        if count := self._held_out():
            try:
                self.dataset, self.held = hold_out(self.whole, count)
            except ValueError as error:
                raise UserError(f"--held-out: {error}") from None

    def _held_out(self) -> int:
        """How many samples to hold out: what was asked for, or what the run began with, or the default.

        UserError where some were asked for and it is not known which there are.
        """
        count, note = self.config.held_out, self.config.out / HELD_OUT_NOTE
        if count is None and note.exists():
            count = json.loads(note.read_text())["held_out"]
        if not isinstance(self.whole, EncodedDataset):
            if count:
                raise UserError(
                    "nothing can be held out of --shares, of several resolutions, or of data still being made: "
                    "--held-out 0"
                )
            return 0
        return min(HELD_OUT, int(len(self.whole) * self.config.HELD_OUT_SHARE)) if count is None else count

    def groups(self) -> list[tuple[Path, ...]]:
        """Folders of --data, those together that are drawn as one set of samples."""
        return [(folder,) for folder in self.config.data] if self.config.shares else [self.config.data]

    def order(self) -> Order | None:
        """The order of samples; None for the loader's own."""
        config = self.config
        if config.shares:
            orders = [ByShard(part, config.loop.seed) for part in self.whole.parts]
            return Mixture(orders, *zip(*config.moving_shares(), strict=True), config.loop.steps * config.batch_size)
        if config.order == "ready":
            return AsReady(self.dataset, config.loop.seed, config.out / "order.jsonl", self.studio.engine.rank == 0)
        return None

    def batches(self) -> Loader:
        config, engine = self.config, self.studio.engine
        return Loader(
            self.dataset, config.batch_size, engine.dp_rank, engine.dp_size, config.loop.seed, config.max_tokens,
            order=self.order(), width=config.model.width, batch_tokens=config.batch_tokens,
        )  # fmt: skip

    def shown(self) -> list[Request]:
        found = []
        parts = getattr(self.dataset, "parts", [self.dataset])
        for index in (index for shard in range(parts[0].shards) for index in self.dataset.rows(shard)):
            with suppress(ValueError):  # the loader names it
                found.append(self.dataset[index])
            if len(found) == SHOWN:
                break
        return samples_shown(found)

    def finished(self, run: Path) -> None:
        """End the producers that this trainer started; those that have made all may still say so."""
        if self.producers is not None:
            whole = isinstance(self.whole, LiveDataset) and self.whole.made() == self.whole.shards
            self.producers.close(SEAL_S if whole else 0.0)

    def hooks(self, run: RunFolder) -> list[HeldOutHook]:
        """The loss on what is held out."""
        if run.writes and not list_checkpoints(run.checkpoints):  # one that goes on keeps what it began with
            write_json(run.path / HELD_OUT_NOTE, {"held_out": 0 if self.held is None else len(self.held)})
        if self.held is None or not self.config.validate_every:
            return []
        density = (self.density, self.density_mean, self.density_std)
        objective = VelocityMSE(*density, self.resolution_shift, self.shift, condition_dropout=0.0)
        config, measure, first = self.config, flow_loss(objective), self.config.MEASURES_FIRST
        return [HeldOutHook(config.validate_every, run, measure, self.held, config.max_tokens, first)]
