"""Draw an export with diffusers' QwenImagePipeline and with our own sampler on the same noise; fail beyond 1e-4."""

import os
from dataclasses import dataclass
from pathlib import Path

try:
    from command_line import UserError, run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

PROMPTS = [
    "two red circles",
    "a blue square left of a green star",
    "a yellow triangle",
    "a pink star and a purple circle",
]


@dataclass(frozen=True)
class Config:
    checkpoint: Path = Path("runs/quick/grpo")
    """The run that was exported; we draw from it."""
    export: Path = Path("runs/quick/export")
    """Its export; diffusers draws from it."""
    out: Path = Path("runs/quick/report/compare.json")
    steps: int = 8
    cfg_scale: float = 4.0
    height: int | None = None
    """Pixels, a multiple of 16. Default: the side that the run was trained at."""
    width: int | None = None
    tolerance: float = 1e-4
    """Largest difference allowed, of latents relative to their largest magnitude and of pixels in 0 to 1."""


def main(config: Config) -> None:
    if not (config.export / "model_index.json").is_file():
        raise UserError(f"{config.export} is no diffusers folder; make one with `python model/export.py`")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import numpy as np
    import torch
    from diffusers import QwenImagePipeline
    from PIL import Image

    from data_pipeline.page import contact_sheet
    from demo.pictures import data_uri
    from files import write_json
    from model.packing import patchify
    from model.sampling.draw import Sampler
    from model.sampling.schedule import FixedSchedule
    from training.loading import load
    from training.source import look

    ours = load(config.checkpoint, sampler=Sampler(FixedSchedule(config.steps), cfg_scale=config.cfg_scale))
    theirs = QwenImagePipeline.from_pretrained(config.export)
    theirs.set_progress_bar_config(disable=True)
    side = look(config.checkpoint).side_px()
    height, width = size = (config.height or side, config.width or side)
    latents = ours.latents(ours.requests(PROMPTS, [size] * len(PROMPTS), list(range(len(PROMPTS)))))
    worst, drawn = {"latents": 0.0, "pixels": 0.0}, ([], [])
    for seed, (prompt, latent) in enumerate(zip(PROMPTS, latents, strict=True)):

        def draw(prompt: str = prompt, seed: int = seed, **output: str):
            return theirs(
                prompt,
                negative_prompt=" ",
                true_cfg_scale=config.cfg_scale,
                height=height,
                width=width,
                num_inference_steps=config.steps,
                generator=torch.Generator().manual_seed(seed),
                **output,
            ).images[0]

        expected, picture = draw(output_type="latent"), draw(output_type="np")
        own = patchify(latent)
        worst["latents"] = max(worst["latents"], float((expected - own).abs().max() / expected.abs().max()))
        with torch.no_grad():
            pixels = ours.vae.decode_latent(latent[None])[0, :, 0]
        own_picture = (pixels / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
        worst["pixels"] = max(worst["pixels"], float(np.abs(picture - own_picture).max()))
        for row, image in zip(drawn, (picture, own_picture), strict=True):
            row.append(Image.fromarray((image * 255).round().astype(np.uint8)))
    print(f"largest difference from diffusers: latents {worst['latents']:.1e}, pixels {worst['pixels']:.1e}")
    if not max(worst.values()) <= config.tolerance:  # also when one is NaN
        raise UserError(f"our pictures and diffusers' differ by more than {config.tolerance:g}")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    sheet = data_uri(contact_sheet(drawn[0] + drawn[1], len(PROMPTS), 128))
    write_json(config.out, {**worst, "pictures": len(PROMPTS), "sheet": sheet})


if __name__ == "__main__":
    run(main, Config)
