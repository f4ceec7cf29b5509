"""A run of steps that are not finite stops, and what it leaves says where that begins."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from small_loop import CONFIGURATION, Cycle, train
from worlds import run_world

from command_line import UserError
from training.engine.checkpoint import list_checkpoints
from training.flow_matching import VelocityMSE
from training.replay import replay
from training.run_folder import read_metrics

BAD = "sample-3"


@dataclass
class BadSample(Cycle):
    """From the third step on one sample's latent is not a number."""

    def __next__(self) -> list:
        batches = super().__next__()
        for sample in (s for batch in batches for s in batch if s.key == BAD and self.epoch > 2):
            sample.latent[0, 0, 0, 0] = torch.nan
        return batches


@dataclass
class BadTarget(VelocityMSE):
    """The loss of one sample is not finite, what the model returns for it is."""

    def loss(self, model, frozen, inputs, target):
        bad = [i for i, s in enumerate(inputs.pack.shapes) if s.txt == 3]  # sample-2 alone has so short a prompt
        ends = torch.tensor([0, *inputs.pack.target_lengths]).cumsum(0)
        target = target.clone()
        for i in bad:
            target[ends[i]] = torch.inf
        return super().loss(model, frozen, inputs, target)


@dataclass
class BreaksAWeight:
    """A hook after which a weight holds a value that is not finite."""

    name: str
    every: int = 2

    def __call__(self, engine, step: int) -> None:
        with torch.no_grad():
            engine.model.get_parameter(self.name)[0] = torch.nan


def stopped(rank: int, folder: Path, what: str) -> str:
    """What a run says that meets what is not finite."""
    from training.engine.config import EngineConfig, ParallelConfig

    config, given = replace(CONFIGURATION, save_every=2), {}
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    parallel = ParallelConfig(tp=size) if what == "tensor parallel" else EngineConfig().parallel
    dp = 1 if what == "tensor parallel" else size
    if what == "sample":
        given["batches"] = BadSample(rank % dp, dp)
    elif what == "target":
        given["objective"] = BadTarget()
    else:
        given["hooks"] = [BreaksAWeight("blocks.1.img.q.weight")]
    with pytest.raises(ValueError) as raised:
        train(folder, config, parallel=parallel, **given)
    return str(raised.value)


@pytest.mark.parametrize(
    "what, size, found",
    [
        ("sample", 2, "rank 1, microbatch 1: the output of img_in is the first that is not finite; the image tokens of "
         f"sample {BAD} are not finite"),
        ("target", 1, "rank 0, microbatch 1: the model's output is finite, the loss of sample sample-2 is not: look at "
         "its targets and weights"),
        ("weight", 1, "rank 0, microbatch 0: the output of blocks.1.img.q is the first that is not finite; its weight "
         "is not"),
        ("tensor parallel", 2, "rank 0, microbatch 0: the output of blocks.1.img.q is the first that is not finite; "
         "its weight is not"),
    ],
)  # fmt: skip
def test_a_run_that_is_not_finite_stops_and_is_replayed(tmp_path: Path, what: str, size: int, found: str):
    said = set(run_world(size, stopped, tmp_path, what))
    step = 3 if what == "target" else 5
    folder = tmp_path / "nan" / f"step_{step:08d}"
    assert said == {
        f"loss or gradient was not finite in 3 steps in a row, the last is {step}; to find out where that begins: "
        f"python -m training.replay {folder}"
    }
    lines = replay(folder)
    assert lines[0] == found
    assert what in ("weight", "tensor parallel") or len(lines) == 1  # the other batches are sound
    rows = read_metrics(tmp_path)
    assert [row["skipped"] for row in rows][-3:] == [1, 2, 3] and len(rows) == step
    assert all(path.name < folder.name for path in list_checkpoints(tmp_path / "checkpoints"))


def test_a_folder_without_a_batch_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="holds no batch"):
        replay(tmp_path)
