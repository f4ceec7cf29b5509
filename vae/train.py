"""Train the VAE: its encoder and decoder from scratch, or a picture decoder for text beside a frozen encoder.

    python vae/train.py --recipe base --data SHARDS --out runs/vae-base
    python vae/train.py --recipe image-decoder --init runs/vae-base --data TEXT_SHARDS --out runs/vae

`base` learns the encoder and a decoder on pictures and clips together (Wan 2.1). `image-decoder` freezes the encoder
and fine-tunes a decoder for pictures on text-rich ones, without a GAN (Qwen-Image report, section 2.2); the decoder
that it started from stays the video decoder. `video-decoder` freezes the encoder too and trains the decoder on with
pictures and clips: what `image-decoder` is to be compared with. The reports give no batch sizes or learning rates;
those here are ours.

Run the same command again to go on. The defaults shown are those of the recipe and preset given.
"""

import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

try:
    import tyro

    from command_line import UserError, flag, run
    from training.engine.config import EngineConfig, OptimizerConfig
    from training.loop import LoopConfig
    from training.run_folder import RunFolder
    from vae.config import PRESETS
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

if TYPE_CHECKING:
    from training.engine.step import Engine
    from vae.crops import Crops


@dataclass(frozen=True)
class Config:
    """One training."""

    recipe: Literal["base", "image-decoder", "video-decoder"] = "base"
    preset: Literal["tiny", "small", "qwen-image"] = "qwen-image"
    """Size of a VAE that starts at random. Default: tiny."""
    data: tuple[Path, ...] = ()
    """Folders of raw shards. Default: the demo's pictures, made if they are missing."""
    init: Path | None = None
    """Start from this VAE: a components folder, a diffusers VAE folder, or another run's. Only base can do without."""
    out: Path | None = None
    """Folder of the run, in which vae/ (and vae_video/) appear at the end. Default: runs/vae-RECIPE."""
    size: int = 256
    """Pictures are shrunk, at random, between not at all and to about the area of this square."""
    crop: int = 256
    """Side of the squares that are cut from them, in pixels (a multiple of 8)."""
    frames: int = 17
    """Frames of a clip, 4k + 1."""
    clip_share: float = 0.25
    """Share of clips among the samples; they are pictures set in motion, unless there are --videos."""
    videos: tuple[Path, ...] = ()
    """Folders of videos (mp4, mkv, webm ...) to take the clips from."""
    batch_size: int = 64
    """Samples in a step, over all ranks."""
    max_frames: int = 32
    """Frames in a microbatch; a picture is one."""
    perceptual: str = "gradient-pyramid"
    """Perceptual distance: gradient-pyramid (edges; no weights), or with local weights lpips:FILE, convnext:FOLDER."""
    perceptual_ratio: float = 0.5
    """Weight of the perceptual term relative to the reconstruction term, held at every moment."""
    kl_weight: float = 1e-6
    sample_every: int = 500
    """Steps between pictures of reconstructions in samples/."""
    statistics_samples: int = 1024
    """Pictures that the latent mean and std are measured on, for a VAE trained from scratch."""
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = field(default_factory=LoopConfig)
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)
    dry_run: bool = False
    """Print what would be trained on what."""


def _engine(lr: float, warmup: int, ema: float) -> EngineConfig:
    optimizer = OptimizerConfig(lr=lr, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=warmup, schedule="cosine")
    return EngineConfig(optimizer=optimizer, dtype="float32", ema_decay=ema)


RECIPES: dict[tuple[str, str], Config] = {
    ("base", "qwen-image"): Config(engine=_engine(1e-4, 1000, 0.999), loop=LoopConfig(300_000, save_every=2000)),
    ("image-decoder", "qwen-image"): Config(
        "image-decoder", clip_share=0.0, frames=1, engine=_engine(5e-5, 500, 0.999), loop=LoopConfig(50_000, 1000)
    ),
    ("video-decoder", "qwen-image"): Config(
        "video-decoder", engine=_engine(5e-5, 500, 0.999), loop=LoopConfig(50_000, 1000)
    ),
}
for _name, _full in [(name, config) for (name, _), config in RECIPES.items()]:
    RECIPES[_name, "tiny"] = replace(
        _full,
        preset="tiny", size=64, crop=32, frames=min(5, _full.frames), batch_size=16,
        perceptual_ratio=0.2, sample_every=200, statistics_samples=256,
        engine=_engine(3e-3, 20, 0.98), loop=LoopConfig(400, 200),
    )  # fmt: skip
    RECIPES[_name, "small"] = replace(
        RECIPES[_name, "tiny"],
        preset="small", crop=64, clip_share=min(0.1, _full.clip_share),
        engine=_engine(2e-3, 50, 0.99), loop=LoopConfig(2000, 500),
    )  # fmt: skip


def recipe(name: str, preset: str | None = None) -> Config:
    """The recipe for a preset, by default the tiny one. ValueError for an unknown one."""
    preset = preset or "tiny"
    if (name, preset) not in RECIPES:
        raise ValueError(
            f"there is no recipe {name} of preset {preset}; there are base, image-decoder and video-decoder, tiny, "
            "small and qwen-image"
        )
    return RECIPES[name, preset]


def main(config: Config) -> None:
    config = checked(config)
    if config.dry_run:
        print(f"{plan(config)}\n{costs(config)}")
        return
    if not config.data:
        from training.demo_data import demo_pictures

        config = replace(config, data=(demo_pictures(),))

    from data_pipeline.loader import Loader
    from training.engine.step import Engine
    from training.loop import train
    from training.randomness import Randomness
    from vae.cost import crop_flops
    from vae.objective import Reconstruction
    from vae.perceptual import perceptual

    dataset = Sources(config.data, config.videos, config.frames, config.clip_share)
    start = starting_point(config)
    build = partial(trainable(config.recipe), start.config, None)
    engine = Engine(start.config, config.engine, config.loop.steps, build=trainable(config.recipe))
    try:
        run_folder = RunFolder(config.out, config, writes=engine.rank == 0)
        if engine.rank == 0:
            for problem in dataset.problems:
                print(f"passed over {problem}", file=sys.stderr)
            print(plan(config), flush=True)
        engine.load_weights((n, w) for n, w in start.state_dict().items() if not n.startswith("video_"))
        batches = Loader(
            dataset, config.batch_size, engine.dp_rank, engine.dp_size, config.loop.seed, config.max_frames
        )
        rng = Randomness(config.loop.seed)
        # The reader's thread cuts the crops: whole pictures, which may be large, don't wait in memory.
        batches.prepare = lambda batch: engine.prepare(objective, batch, rng)
        objective = Reconstruction(
            config.crop,
            config.size,
            config.perceptual_ratio,
            config.kl_weight,
            sample_posterior=config.recipe == "base",
            perceptual=perceptual(config.perceptual).to(engine.device),
            flops=lambda frames: sum(crop_flops(build, config.crop, frames)),
        )
        shown, _ = objective.prepare([dataset[i] for i in range(min(8, dataset.pictures))], Randomness(0), 1)
        hook = ReconstructionHook(config.sample_every, run_folder, shown)
        train(engine, objective, batches, config.loop, run_folder, [hook])
        batches.close()
        if engine.rank == 0:
            finish(config, start, dataset)
    finally:
        engine.close()


def checked(config: Config) -> Config:
    """The config with its default folders; UserError for what cannot be."""
    config = replace(config, out=config.out or Path(f"runs/vae-{config.recipe}"))
    if config.crop < 8 or config.crop % 8:
        raise UserError(f"--crop must be a multiple of 8, not {config.crop}")
    if config.size < config.crop:
        raise UserError(f"--size {config.size} is less than --crop {config.crop}")
    if config.frames < 1 or config.frames % 4 != 1:
        raise UserError(f"--frames must be 4k + 1, not {config.frames}")
    if not 0 <= config.clip_share < 1:
        raise UserError(f"--clip-share lies in [0, 1), not {config.clip_share}")
    for path in (*config.data, *config.videos, config.init):
        if path is not None and not path.exists():
            raise UserError(f"{path} does not exist")
    if config.recipe != "base" and config.init is None:
        raise UserError(f"--recipe {config.recipe} needs --init: the VAE whose encoder it keeps")
    return config


def plan(config: Config) -> str:
    """What is trained on what, in a line."""
    what = {"base": "encoder and decoder", "image-decoder": "picture decoder", "video-decoder": "decoder"}[
        config.recipe
    ]
    origin = f"{config.preset}, at random" if config.init is None else str(config.init)
    return (
        f"{what} of a VAE ({origin}) on {config.crop} px crops of {', '.join(map(str, config.data)) or 'the demo'}, "
        f"{config.loop.steps} steps of {config.batch_size} -> {config.out}"
    )


def costs(config: Config) -> str:
    """Parameters, FLOPs and bytes, in lines, of one process."""
    from vae.cost import described

    vae_config = PRESETS[config.preset] if config.init is None else starting_point(config).config
    clips = config.clip_share if config.frames > 1 else 0.0
    mix = {1: 1 - clips} | ({config.frames: clips} if clips else {})
    return described(partial(trainable(config.recipe), vae_config, None), config.crop, mix, config.batch_size)


class Sources:
    """The pictures of raw shards and, as clips, windows of videos or the same pictures set in motion.

    Made for `data_pipeline.loader.Loader`. If there are too few pictures or windows for `clip_share`, they are taken
    several times, each time cropped differently.
    """

    def __init__(self, folders: tuple[Path, ...], videos: tuple[Path, ...], frames: int, clip_share: float):
        import numpy as np

        from data_pipeline.shards import RawPictures
        from vae.videos import find_videos, open_video

        self._files = RawPictures(folders)
        if not self._files:
            raise UserError(f"no pictures in {', '.join(map(str, folders))}")
        self.problems = list(map(str, self._files.problems))
        self._windows = []
        for folder, path in ((f, p) for f in videos for p in find_videos(f)):
            try:
                video = open_video(path)
                self._windows += [(video, f"{path.relative_to(folder)}/{s}", s) for s in video.windows(frames)]
            except ValueError as error:
                self.problems.append(str(error))
        if videos and not self._windows:
            raise UserError("; ".join(self.problems) or f"no videos in {', '.join(map(str, videos))}")
        odds = clip_share / (1 - clip_share) if frames > 1 else 0.0
        clips = round(len(self._files) * odds)
        self.pictures = len(self._files)
        """The first so many samples are pictures, the others clips."""
        if odds and clips < len(self._windows):
            clips = len(self._windows)
            self.pictures = max(self.pictures, round(clips / odds))
        self.tokens = np.array([1] * self.pictures + [frames] * clips)
        """Frames of each sample."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int):
        """Decode one picture or window; ValueError names a broken one."""
        import numpy as np
        import torch

        from vae.crops import Source

        length = int(self.tokens[index])
        if (clip := index - self.pictures) >= 0 and self._windows:
            turn, number = divmod(clip, len(self._windows))
            video, key, start = self._windows[number]
            pixels = video.read(start, length)
        else:
            turn, number = divmod(index if clip < 0 else clip, len(self._files))
            key = self._files.key(number)
            pixels = np.array(self._files[number])[None]
        suffix = f"/clip{turn + 1}" if clip >= 0 else f"/{turn}" if turn else ""
        return Source(key + suffix, torch.from_numpy(pixels).permute(0, 3, 1, 2), length)


@dataclass
class ReconstructionHook:
    """Saves the same crops, above, and what the averaged weights make of them, below, as samples/step_N.png."""

    every: int
    run: RunFolder
    crops: "Crops"

    def __call__(self, engine: "Engine", step: int) -> None:
        import torch
        from PIL import Image

        from model.moving import moved

        ((_, _, drawn),) = engine.frozen["ema"](moved(self.crops, engine.device))
        if self.run.writes:
            rows = [torch.cat(list(x[:, :, 0]), dim=-1) for x in (self.crops.pixels[0], drawn.cpu().float())]
            pixels = ((torch.cat(rows, dim=-2).clamp(-1, 1) + 1) * 127.5).round().byte()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(self.run.samples / f"step_{step:08d}.png")


def starting_point(config: Config):
    """The VAE that training starts from."""
    from vae.autoencoder import VAE

    if config.init is not None:
        vae = VAE.from_folder(config.init)
        if vae.video_decoder is not None and config.recipe != "image-decoder":
            raise UserError(f"{config.init} has a picture decoder of its own; start from {config.init / 'vae_video'}")
        return vae
    return VAE(PRESETS[config.preset]).initialize(config.loop.seed)


def trainable(recipe_name: str):
    """How the engine builds the module: the VAE with one decoder, its encoder frozen but for the recipe `base`."""

    def build(vae_config, ops):
        from vae.autoencoder import VAE

        vae = VAE(vae_config)
        if recipe_name != "base":
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
        return vae

    return build


def finish(config: Config, start, dataset: Sources) -> None:
    """Write vae/ (and vae_video/) with the averaged weights; latent statistics only for a VAE trained from scratch."""
    import torch

    from training.engine.checkpoint import read_tensors, resolve
    from vae.latent_statistics import with_measured_statistics

    trained = read_tensors(resolve(config.out))
    with torch.no_grad():
        if config.recipe == "image-decoder":
            start.split_decoders()
        if config.recipe != "base":
            trained = {n: w for n, w in trained.items() if n.startswith(("decoder.", "post_quant_conv."))}
        start.load_state_dict({**start.state_dict(), **trained})
    if config.init is None:
        pictures = (dataset[i] for i in range(min(dataset.pictures, config.statistics_samples)))
        start = with_measured_statistics(start, pictures, config.size)
    start.save(config.out)
    print(f"wrote {config.out}/vae{' and vae_video' if start.video_decoder is not None else ''}", flush=True)


def defaults(argv: list[str]) -> Config:
    """The recipe that the command line names."""
    return recipe(flag(argv, "--recipe") or "base", flag(argv, "--preset"))


if __name__ == "__main__":
    run(main, defaults)
