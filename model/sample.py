"""Draw pictures for prompts given at the command line, from a run, a checkpoint or a diffusers folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

try:
    from command_line import UserError, progress, run
    from training.source import BASE, look
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Config:
    checkpoint: str = str(BASE)
    """A run folder, a checkpoint, a diffusers folder, a hub id or a LoRA. Default: the shipped base."""
    base: Path | None = None
    """Model that the LoRA of --checkpoint belongs to, for files that don't say."""
    prompt: tuple[str, ...] = ("a red circle",)
    """One picture is drawn for each prompt."""
    image: tuple[Path, ...] = ()
    """Pictures to edit, given to every prompt."""
    output: Path = Path("samples")
    """Folder for the pictures, NUMBER.png."""
    height: int | None = None
    """Pixels, a multiple of 16. Default: the side that the model was trained at (a published one: 1024)."""
    width: int | None = None
    steps: int = 50
    cfg_scale: float = 4.0
    """1 draws without guidance."""
    negative_prompt: str = " "
    seed: int = 0
    """Seed of the first picture; the others count on from it."""
    ema: bool = True
    """Use a run's averaged weights."""
    components: Path | None = None
    """Folder with text_encoder/, tokenizer/ and vae/ (default: what the checkpoint names)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, float32 else."""
    dry_run: bool = False
    """Say what would be drawn, and stop."""


def main(config: Config) -> None:
    side = look(config.checkpoint, config.base).side_px()
    size = (config.height or side, config.width or side)
    if size[0] % 16 or size[1] % 16 or min(size) < 16:
        raise UserError(f"{size[0]} x {size[1]} pixels: both sides must be positive multiples of 16")
    if missing := [str(p) for p in config.image if not p.is_file()]:
        raise UserError(f"no picture at {', '.join(missing)}")
    images = [read_picture(path) for path in config.image]
    plan = f"{size[0]} x {size[1]} px, {config.steps} steps, guidance {config.cfg_scale:g}"
    print(f"{len(config.prompt)} pictures of {plan}, from {config.checkpoint}")
    if config.dry_run:
        return

    import torch
    from PIL import Image

    from files import atomic_file
    from model.sampling.draw import Sampler
    from model.sampling.schedule import FixedSchedule
    from training.loading import load

    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    dtype = ("bfloat16" if device == "cuda" else "float32") if config.dtype == "auto" else config.dtype
    sampler = Sampler(FixedSchedule(config.steps), cfg_scale=config.cfg_scale)
    maker = load(
        config.checkpoint, config.ema, config.components, device, getattr(torch, dtype), sampler=sampler,
        base=config.base, negative_prompt=config.negative_prompt,
    )  # fmt: skip
    config.output.mkdir(parents=True, exist_ok=True)
    with progress(len(config.prompt), "draw", "picture") as bar:
        for i, prompt in enumerate(config.prompt):
            (picture,) = maker.generate([prompt], [size], [config.seed + i], [images])
            with atomic_file(config.output / f"{i}.png") as file:
                Image.fromarray(picture).save(file, "PNG")
            bar.update()
    print(f"wrote {config.output}/0.png" + (f" … {len(config.prompt) - 1}.png" if len(config.prompt) > 1 else ""))


def read_picture(path: Path) -> "Image.Image":
    """A picture as training sees it: upright, in sRGB, on white. UserError if it is none."""
    from data_pipeline.pictures import decode

    try:
        return decode(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} {error}") from None


if __name__ == "__main__":
    run(main, Config)
