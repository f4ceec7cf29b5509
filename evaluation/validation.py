"""A small validation that trainers call on their moving average: a few frozen prompts, judged at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evaluation.intervals import Scores, estimate
from evaluation.prompts import shapes_prompts
from evaluation.suites import ShapesSuite
from model.sampling.sampler import Condition, sample
from model.text_to_image import PIXELS_PER_TOKEN, TextToImage, initial_noise, to_uint8

if TYPE_CHECKING:
    from model.conditioner import Conditioner
    from training.engine.step import Engine
    from training.run_folder import RunFolder

PROMPTS = 48
TOKENS_PER_PACK = 1024
"""Image tokens drawn together."""

Generate = Callable[[list[str], list[int]], list[np.ndarray]]
"""generate(prompts, seeds): uint8 [h, w, 3] pictures, one for each pair."""


def score(
    generate: Generate, split: str = "validation", n: int = PROMPTS, seeds: Sequence[int] = (0,)
) -> dict[str, float]:
    """Draw the first `n` prompts of a split of the shapes world with each seed, and judge the pictures.

    Returns {"judge", "judge_low", "judge_high"} (mean over tags with its 95 % interval, clustered by prompt),
    {"reward"} (the same by the reward's detector) and {"judge/TAG"}. Raises ValueError for fewer than two prompts.
    """
    suite = ShapesSuite(split)
    prompts = suite.prompts[:n]
    if len(prompts) < 2 or not seeds:
        raise ValueError(f"validation needs two prompts and a seed at least, got {len(prompts)} and {len(seeds)}")
    drawn = [(p, seed) for p in prompts for seed in seeds]
    images = generate([p.text for p, _ in drawn], [seed for _, seed in drawn])
    rows = suite.score(images, [p for p, _ in drawn])
    names, strata = [p.id for p, _ in drawn], [p.stratum for p, _ in drawn]
    judged = estimate(Scores(rows["judge"], names, strata), suite.bounds)
    result = {"judge": judged.value, "judge_low": judged.low, "judge_high": judged.high}
    result["reward"] = estimate(Scores(rows["reward"], names, strata), suite.bounds).value
    for tag in dict.fromkeys(strata):
        values = [v for v, s in zip(rows["judge"], strata, strict=True) if s == tag]
        result[f"judge/{tag}"] = sum(values) / len(values)
    return result


@dataclass
class Validation:
    """Draws the first validation prompts with the moving average and logs their scores; a hook of `training.loop`.

    Data-parallel ranks share the pictures; the first process judges them.
    """

    every: int
    run: "RunFolder"
    vae: Any
    conditions: list[Condition]
    """Of the split's first prompts, in order, on the CPU."""
    side_px: int
    steps: int = 20
    cfg_scale: float = 4.0

    def __call__(self, engine: "Engine", step: int) -> None:
        pictures = self.draw(engine)
        if self.run.writes:
            self.run.log_validation(step, score(lambda prompts, seeds: pictures, n=len(pictures)))

    def draw(self, engine: "Engine") -> list[np.ndarray]:
        """The uint8 picture of every prompt, on all ranks."""
        n, ranks = len(self.conditions), engine.dp_size
        # As many on every rank, or one without any would miss the forward that gathers the average: the last ranks
        # draw again what others have drawn, and keep it to themselves.
        mine = range(engine.dp_rank, -(-n // ranks) * ranks, ranks)
        pictures = torch.zeros(n, self.side_px, self.side_px, 3, dtype=torch.uint8, device=engine.device)
        velocity = partial(engine.frozen, "ema")
        painter = TextToImage(velocity, None, self.vae, engine.device)
        together = max(1, TOKENS_PER_PACK // (self.side_px // PIXELS_PER_TOKEN) ** 2)
        for start in range(0, len(mine), together):
            some = mine[start : start + together]
            conditions = [self.conditions[i % n].to(engine.device) for i in some]
            noise = [initial_noise((self.side_px, self.side_px), i % n).to(engine.device) for i in some]
            latents = sample(velocity, conditions, noise, self.steps, self.cfg_scale, engine.align)
            for i, latent in zip(some, latents, strict=True):
                if i < n:
                    pictures[i] = torch.from_numpy(to_uint8(painter.decode(latent)))
        if ranks > 1:
            torch.distributed.all_reduce(pictures, group=engine.layout.dp_group)
        return list(pictures.cpu().numpy())


def validations(
    every: int,
    run: "RunFolder",
    engine: "Engine",
    components: Path | None,
    side_px: int,
    vae: Any,
    conditioner: "Conditioner | None" = None,
) -> list[Validation]:
    """The hook of a trainer, or none if `every` is 0 or `components` hold no text encoder for the prompts.

    Without a `conditioner` the one in `components` is loaded, and let go when the prompts are encoded.
    """
    if not every or components is None or not (components / "text_encoder").is_dir():
        return []
    if conditioner is None:
        from model.conditioner import Conditioner

        dtype = torch.bfloat16 if engine.device.type == "cuda" else torch.float32
        conditioner = Conditioner.from_folder(components, engine.device, dtype)
    texts = conditioner.encode([p.text for p in shapes_prompts("validation")[:PROMPTS]])
    (empty,) = conditioner.encode([" "])
    return [Validation(every, run, vae, [Condition(txt, empty).to("cpu") for txt in texts], side_px)]
