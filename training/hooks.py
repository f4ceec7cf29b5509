"""What a trainer does every so many steps: pictures of its moving average, and scores of pictures."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from files import atomic_file
from model.generator import Generator
from training.run_folder import RunFolder
from training.studio import Studio

if TYPE_CHECKING:
    import numpy as np

    from model.sampling.draw import Request, Sampler
    from training.engine.step import Engine


@dataclass
class SampleHook:
    """Draws `requests` by the moving average into samples/step_N.png."""

    every: int
    run: RunFolder
    studio: Studio
    requests: "list[Request]"
    sampler: "Sampler"
    first: bool = False
    """Also before the first step."""

    def __call__(self, engine: "Engine", step: int) -> None:
        pictures = self.studio.shared_pictures(self.requests, self.sampler, "ema")
        if self.run.writes:
            with atomic_file(self.run.samples / f"step_{step:08d}.png") as file:
                _row(pictures).save(file, "PNG")


def requests_for(texts: list[str], studio: Studio, side_px: int) -> "list[Request]":
    """Requests for square pictures of a user's prompts, each at the seed that its text gives."""
    from model.sampling.draw import Request
    from model.sampling.guidance import Condition
    from model.text_to_image import PIXELS_PER_LATENT
    from training.randomness import Randomness

    if not texts:
        return []
    *hidden, empty = (states.cpu() for states in studio.encode([*texts, " "]))
    side, rng = side_px // PIXELS_PER_LATENT, Randomness(0)
    return [
        Request(Condition(states, empty), rng.normal(text, 0, "sample", (16, 1, side, side)))
        for text, states in zip(texts, hidden, strict=True)
    ]


class Validation(Protocol):
    """Scores pictures of prompts that never change. A user's own is named by --validation FILE.py:CLASS."""

    texts: list[str]
    seeds: list[int]
    """One for each text."""

    def score(self, images: "list[np.ndarray]") -> dict[str, Any]:
        """Scores by name of the uint8 pictures [H, W, 3] of all texts; "each", if there, is kept in a file of its own:
        lists with an entry a picture, for comparisons."""


@dataclass
class ValidationHook:
    """Draws a validation's prompts and logs their scores. Ranks share the pictures; the first process scores them."""

    every: int
    run: RunFolder
    generator: Generator
    validation: Validation
    side_px: int
    first: bool = False

    def __call__(self, engine: "Engine", step: int) -> None:
        texts, seeds = self.validation.texts, self.validation.seeds
        pictures = self.generator.generate(texts, [(self.side_px, self.side_px)] * len(texts), seeds)
        if self.run.writes:
            scores = dict(self.validation.score(pictures))
            each = scores.pop("each", None)
            self.run.log_scores("validation", step, scores, each)


def _row(pictures: "list[np.ndarray]"):
    from PIL import Image

    images = [Image.fromarray(p) for p in pictures]
    row = Image.new("RGB", (sum(i.width + 2 for i in images), max(i.height for i in images)), "white")
    x = 0
    for image in images:
        row.paste(image, (x, 0))
        x += image.width + 2
    return row
