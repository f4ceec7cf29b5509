"""What trainers on encoded data take beyond all others. Imports no torch, for `--help`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from command_line import UserError
from training.cost.step import Work
from training.start import RunConfig


@dataclass(frozen=True)
class DataConfig(RunConfig):
    data: tuple[Path, ...] = ()
    """Encoded data sets (of data_pipeline/produce.py), or a single one that is still being made."""
    shares: tuple[str, ...] = ()
    """Share of each folder of --data, as .7, or as .9...5 from the first step to the last. Default: every sample as
    often as any other."""
    raw: str | None = None
    """Raw shards, a folder or URLs, to encode into --data while training goes on, by --producers."""
    producers: str = "1"
    """Who encodes --raw: a number of processes beside each node's trainers, thread (within the first of them), or
    ray:NUMBER of tasks. More may be started by hand with data_pipeline/produce.py."""
    order: Literal["shards", "ready"] = "shards"
    """Order of the first pass over data that are still being made: as their shards are numbered, which is that of the
    finished data; or as they become ready, which is noted in OUT/order.jsonl."""
    ahead: int = 32
    """Shards of --raw that may be encoded and wait to be trained on."""
    batch_size: int = 512
    """Samples in a step, over all ranks."""
    batch_tokens: int | None = None
    """Tokens, of text and image, in a step, over all ranks; then --batch-size counts for nothing."""
    condition_dropout: float = 0.1
    """Probability that a sample trains with the empty prompt, for guidance."""
    held_out: int | None = None
    """Samples of --data that are not trained on: with each validation the loss on them is logged, at fixed draws.
    Default: a tenth, 512 at most; none of data that are still being made, or of --shares."""

    HELD_OUT_SHARE: ClassVar[float] = 1 / 10
    """Of the samples, where no number is given."""

    def work(self) -> Work:
        work = super().work()
        if (each := work.img + work.txt) > self.max_tokens:
            raise UserError(
                f"a picture with its prompt takes {each} tokens of a microbatch: --max-tokens {each} or more"
            )
        samples = self.batch_size
        if self.batch_tokens is not None:
            samples = max(1, self.batch_tokens // (work.img + work.txt))
        return replace(work, samples=samples, encodes=self.validation is not None)

    def require_sources(self) -> None:
        """UserError for settings of data that do not go together."""
        if self.raw is not None and len(self.data) != 1:
            raise UserError("--raw is encoded into one folder: name it by --data")
        if self.shares and len(self.shares) != len(self.data):
            raise UserError(f"--shares names {len(self.shares)} for {len(self.data)} folders of --data")
        if self.shares and self.order == "ready":
            raise UserError("--order ready goes with one data set, not with --shares")
        if self.batch_tokens is not None and (self.shares or self.batch_tokens < 1):
            raise UserError("--batch-tokens is a positive number, and not for --shares, which are counted in samples")
        self.moving_shares()

    def moving_shares(self) -> list[tuple[float, float]]:
        """(first, last) share of each folder of --data; [] for none. UserError for what is no share."""
        try:
            ends = [share.partition("..") for share in self.shares]
            return [(float(first), float(last or first)) for first, _, last in ends]
        except ValueError:
            raise UserError(f"--shares {' '.join(self.shares)}: a share is a number, or two as in .9...5") from None
