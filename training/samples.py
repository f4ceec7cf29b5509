"""Pictures of the moving average while it trains: the data set's first prompts at fixed seeds."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from data_pipeline.sample import EncodedSample
from model.sampling.sampler import Condition, sample
from model.text_to_image import TextToImage, to_uint8
from training.randomness import Randomness
from training.run_folder import RunFolder

if TYPE_CHECKING:
    from training.engine.step import Engine


@dataclass
class SampleHook:
    """Draws `prompts` every so many steps into samples/step_N.png; a hook of `training.loop`."""

    every: int
    run: RunFolder
    vae: Any
    prompts: list[EncodedSample]
    """Whose text, empty prompt, references and size are used."""
    steps: int = 20
    cfg_scale: float = 4.0
    together: int = 8
    """Pictures drawn in one pack."""

    def __call__(self, engine: "Engine", step: int) -> None:
        conditions = [Condition(s.txt, s.txt_empty, s.references).to(engine.device) for s in self.prompts]
        noise = [Randomness(0).normal(s.key, 0, "sample", tuple(s.latent.shape)) for s in self.prompts]
        noise = [n.to(engine.device) for n in noise]
        velocity = partial(engine.frozen, "ema")
        latents = []
        for i in range(0, len(noise), self.together):
            some = slice(i, i + self.together)
            latents += sample(velocity, conditions[some], noise[some], self.steps, self.cfg_scale, engine.align)
        if self.run.writes:
            with torch.inference_mode():
                draw = TextToImage(velocity, None, self.vae, engine.device)
                _save_row([draw.decode(latent) for latent in latents], self.run.samples / f"step_{step:08d}.png")


def _save_row(pictures: list, path) -> None:
    from PIL import Image

    images = [Image.fromarray(to_uint8(p)) for p in pictures]
    row = Image.new("RGB", (sum(i.width + 2 for i in images), max(i.height for i in images)), "white")
    x = 0
    for image in images:
        row.paste(image, (x, 0))
        x += image.width + 2
    row.save(path)
