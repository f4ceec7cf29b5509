"""Direct preference optimisation: learn from pairs of pictures which one is better (Diffusion-DPO for flow matching).

    torchrun --nproc-per-node 8 posttrain/dpo.py --init runs/sft --prompts PROMPTS.jsonl --rewards ocr

Without --pairs, several pictures of each prompt are drawn by --init first, and the reward's best and worst of them make
a pair. Run the same command again to go on. Formulas are in docs/posttraining.md.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

try:
    import tyro

    from command_line import UserError, progress
    from training.cost.step import Work
    from training.engine.config import EngineConfig, fast_dtype
    from training.loop import LoopConfig
    from training.start import RunConfig, optimizer, picture_side, start, toy_optimizer
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config(RunConfig):
    pairs: Path | None = None
    """Pairs to learn from: a folder with KEY.win.png, KEY.lose.png and KEY.txt, or one that an earlier run drew."""
    num_pairs: int = 4096
    """Pairs to draw if none are given."""
    prompts: Path | None = None
    """JSON lines {"prompt": ..., ...} to draw. Default: the shapes world's training prompts."""
    rewards: tuple[str, ...] = ("shapes_soft",)
    """What judges the drawn pictures, as NAME or NAME=WEIGHT: shapes, shapes_soft, ocr, remote(url=URL), or your own
    FILE.py:CLASS."""
    pictures: int = 4
    """Pictures drawn of each prompt."""
    min_gap: float = 0.02
    """Smallest difference of reward between the best and the worst picture that makes a pair."""
    size_px: int | None = None
    """Side of the (square) pictures, a multiple of 16. Default: what --init was trained at."""
    sampling_steps: int = 40
    cfg_scale: float = 4.0
    beta: float = 1000.0
    """Weight of the error gap, which is a mean over a latent's elements (Diffusion-DPO's 2000 is 1000 here)."""
    positive: float = 0.0
    """Weight of what a winner's error grows by (DPO-Positive); without it both errors may grow, the loser's more."""
    batch_size: int = 128
    """Pairs in a step, over all ranks."""
    held_out: int | None = None
    """Pairs that are not trained on: with each validation the loss on them is logged. Default: a tenth, at most 256."""
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = field(default_factory=lambda: LoopConfig(2000, save_every=200))
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=lambda: optimizer(lr=1e-6))

    NAME: ClassVar = "dpo"
    TOY: ClassVar = dict(
        num_pairs=1000, rewards=("shapes=.5", "shapes_soft=.5"), pictures=6, min_gap=0.1, sampling_steps=10,
        cfg_scale=1.0, beta=200.0, positive=1.0, batch_size=64, max_tokens=16384, loop=LoopConfig(80, save_every=20),
        engine=toy_optimizer(1e-4, fast_dtype()),
        sample_every=40, validate_every=40, validation="evaluation.validation:WholeShapesValidation",
    )  # fmt: skip

    def completed(self) -> "Config":
        config = super().completed()
        return replace(config, size_px=picture_side(config.size_px, config.source))

    def side_px(self) -> int:
        return self.size_px

    def work(self) -> Work:
        """Winners and losers; the reference sees both."""
        return replace(super().work(), samples=2 * self.batch_size, unit="pictures", references=1, fixed=1)

    def summary(self) -> str:
        source = self.pairs or f"{self.num_pairs} pairs, best and worst of {self.pictures} pictures a prompt"
        return f"{super().summary()}; {self.loop.steps} steps of {self.batch_size} pairs from {source}"


if __name__ == "__main__":
    start(Config, "posttrain.dpo:DPO")

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.encoding import Encoder
from data_pipeline.loader import Loader
from model.moving import moved
from model.packing import ModelInputs
from model.sampling.draw import Request, Sampler
from model.sampling.schedule import FixedSchedule
from posttrain.page import Paged
from posttrain.preference import (
    Pair,
    PairDataset,
    PairDrawing,
    encode_pair,
    is_finished,
    list_judged,
    pair_settings,
    write_pairs,
)  # fmt: skip
from posttrain.rollout.prompts import read_prompts
from rewards import WeightedRewards
from training.algorithm import Fixed, Frozen, Metrics, Model
from training.encoded_with import require_encoded_with
from training.flow_matching import noised, per_sample_mean, samples_shown
from training.held_out import DRAW_BY, HeldOutHook, hold_out
from training.randomness import Randomness
from training.run_folder import RunFolder
from training.studio import Studio

if TYPE_CHECKING:
    from training.engine.step import Engine

HELD_OUT = 256
"""Pairs that are held out at most where no number is given."""


class DPO(Paged):
    """Diffusion-DPO for flow matching over batches of `Pair`, against the weights that the run started from.

    Winner and loser share noise level and noise, and so do policy and reference: what a pair contributes is then the
    difference that the pictures make, not that of two draws. sigma ~ U(0, 1), as in the report.
    """

    frozen = {"reference": Fixed()}

    def __init__(self, config: Config, studio: Studio):
        self.config, self.studio = config, studio
        encoded = config.pairs is not None and (config.pairs / "dataset.json").is_file()
        self.folder = config.pairs if encoded else config.out / "pairs"
        self.missing, self.reward = [], None
        if encoded or is_finished(self.folder, pair_settings(config)):
            return
        if config.pairs is not None:
            self.missing = list_judged(config.pairs)
        else:
            self.missing, self.reward = read_prompts(config.prompts), WeightedRewards(config.rewards)

    def batches(self) -> Loader:
        config, engine = self.config, self.studio.engine
        if self.missing:
            self._make_pairs()
            self.studio.forget_text_encoder()
        if engine.rank == 0:
            require_encoded_with(config.components, [self.folder])
        self.dataset, self.held = PairDataset(self.folder, config.num_pairs if config.pairs is None else None), None
        count = min(HELD_OUT, len(self.dataset) // 10) if config.held_out is None else config.held_out
        if count:
            try:
                self.dataset, self.held = hold_out(self.dataset, count)
            except ValueError as error:
                raise UserError(f"--held-out: {error}") from None
        return Loader(
            self.dataset, config.batch_size, engine.dp_rank, engine.dp_size, config.loop.seed, config.max_tokens
        )

    def shown(self) -> list[Request]:
        return samples_shown([self.dataset[i].win for i in range(min(8, len(self.dataset)))])

    def prepare(self, batch: list[Pair], rng: Randomness, align: int) -> tuple[ModelInputs, Tensor]:
        """Inputs of winners, then losers, and their velocities [n_target, C]."""
        samples = [p.win for p in batch] + [p.lose for p in batch]
        sigma = torch.stack([rng.uniform(p.key, p.epoch, "sigma") for p in batch]).repeat(2)
        noise = [rng.normal(p.key, p.epoch, "noise", tuple(p.win.latent.shape)) for p in batch] * 2
        return noised(samples, [s.txt for s in samples], noise, sigma, align)

    def loss(self, model: Model, frozen: Frozen, inputs: ModelInputs, target: Tensor) -> tuple[Tensor, float, Metrics]:
        losses, found = self.judged(model, frozen["reference"], inputs, target)
        metrics = {name: values.detach().sum() for name, values in found.items()} | {"loss": found["loss"].detach()}
        return losses.sum(), float(len(losses)), metrics

    def judged(
        self, model: Model, reference: Model, inputs: ModelInputs, target: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is minimised, and how a model does against the reference: [n] each, of n pairs."""
        error = lambda v: per_sample_mean((v.float() - target) ** 2, inputs).unflatten(0, (2, -1))  # noqa: E731
        before, after = error(reference(inputs)), error(model(inputs))
        losses, margin = dpo_loss(after, before, self.config.beta)
        accuracy = (margin > 0).float() + 0.5 * (margin == 0).float()  # undecided counts half
        win_gain, lose_gain = before - after
        found = {"loss": losses, "accuracy": accuracy, "margin": margin, "win_gain": win_gain, "lose_gain": lose_gain}
        if self.config.positive:
            losses, _ = dpo_loss(after, before, self.config.beta, self.config.positive)
        return losses, found

    def hooks(self, run: RunFolder) -> list[HeldOutHook]:
        """The loss on what is held out."""
        if self.held is None or not self.config.validate_every:
            return []

        def measure(engine: "Engine", batch: list[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
            inputs, target = (moved(x, engine.device) for x in self.prepare(batch, DRAW_BY, engine.align))
            _, found = self.judged(engine.frozen["ema"], engine.frozen["reference"], inputs, target)
            return inputs.sigma[: len(batch)], found

        config, names = self.config, ("loss", "accuracy", "margin")
        return [HeldOutHook(config.validate_every, run, measure, self.held, config.max_tokens, True, names)]

    def _make_pairs(self) -> None:
        """Draw pairs for prompts and judge them, or encode judged pictures. UserError if that gives none."""
        config, studio = self.config, self.studio
        encoder = Encoder(studio.conditioner, studio.vae, config.size_px)
        if self.reward is None:
            make, wanted = lambda some: (s for judged in some for s in encode_pair(encoder, judged)), len(self.missing)
        else:
            sampler = Sampler(FixedSchedule(config.sampling_steps), cfg_scale=config.cfg_scale)
            rng = Randomness(config.loop.seed)
            drawing = PairDrawing(studio, sampler, self.reward, config.size_px, config.pictures, config.min_gap, rng)
            make, wanted = drawing.pairs, config.num_pairs
        with progress(wanted, "pairs", "pair") as bar:
            show = lambda found: bar.update(min(found, wanted) - bar.n)  # noqa: E731
            settings = pair_settings(config)
            found = write_pairs(self.folder, settings, self.missing, make, wanted, encoder, studio.engine, show)
        if 0 < found < wanted and studio.engine.rank == 0:
            print(f"{found} of {wanted} pairs found; more --prompts, more --pictures or a lower --min-gap give more")
        if not found:
            raise UserError(
                f"of {len(self.missing)} prompts none had two pictures whose rewards differ by {config.min_gap}: train "
                "the model longer, lower --min-gap, or give --pairs"
            )


def dpo_loss(errors: Tensor, reference_errors: Tensor, beta: float, positive: float = 0.0) -> tuple[Tensor, Tensor]:
    """-log sigmoid(-beta ((win - lose) - (reference win - reference lose))) -> (losses [S], margins [S]).

    errors [2, S]: squared velocity errors (win, lose), each the *mean* over the elements of a latent. The margin is how
    much more the policy gained on the winner than on the loser, in the same unit. With a sum over D elements
    the same beta would be D times as strong; Diffusion-DPO's code (arXiv 2311.12908) writes beta / 2 before the same
    mean, so its 5000 is 2500 here. Source: Qwen-Image report, section 5.2.1. `positive` takes that many times a growth
    of the winner's error from the margin in the loss (DPO-Positive, arXiv 2402.13228).
    """
    (win, lose), (reference_win, reference_lose) = errors, reference_errors
    margin = (reference_win - win) - (reference_lose - lose)
    worse = (win - reference_win).clamp_min(0)
    return -F.logsigmoid(beta * (margin - positive * worse)), margin
