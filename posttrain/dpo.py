"""Direct preference optimisation: learn from pairs of pictures which one is better (Diffusion-DPO for flow matching).

    torchrun --nproc-per-node 8 posttrain/dpo.py --init runs/sft --prompts PROMPTS.jsonl --rewards ocr

Without --pairs, several pictures of each prompt are drawn by --init first, and the reward's best and worst of them make
a pair. Run the same command again to go on.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

try:
    import tyro

    from command_line import UserError, progress, run
    from posttrain.start import TOY, RunConfig, artist, begin, engine_defaults, picture_side, plan, resolve
    from training.engine.config import EngineConfig
    from training.loop import LoopConfig
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

STAGES_BEFORE = ("sft", "pretrain-1328", "pretrain-640", "pretrain-256")


@dataclass(frozen=True)
class Config(RunConfig):
    out: Path = Path("runs/dpo")
    """Folder of the run."""
    pairs: Path | None = None
    """Pairs to learn from: a folder with KEY.win.png, KEY.lose.png and KEY.txt, or one that an earlier run drew."""
    num_pairs: int = 32 if TOY else 4096
    """Pairs to draw if none are given."""
    prompts: Path | None = None
    """JSON lines {"prompt": ..., ...} to draw. Default: the shapes world's training prompts."""
    rewards: tuple[str, ...] = ("shapes_soft",)
    """What judges the drawn pictures, as NAME or NAME=WEIGHT: shapes, shapes_soft, ocr."""
    pictures: int = 4
    """Pictures drawn of each prompt."""
    min_gap: float = 0.02
    """Smallest difference of reward between the best and the worst picture that makes a pair."""
    size_px: int | None = None
    """Side of the (square) pictures, a multiple of 16. Default: what --init was trained at."""
    sampling_steps: int = 12 if TOY else 40
    cfg_scale: float = 4.0
    beta: float = 200.0 if TOY else 1000.0
    """Weight of the error gap, which is a mean over a latent's elements (Diffusion-DPO's 2000 is 1000 here)."""
    batch_size: int = 16 if TOY else 128
    """Pairs in a step, over all ranks."""
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = field(
        default_factory=lambda: LoopConfig(20, save_every=10) if TOY else LoopConfig(2000, save_every=200)
    )
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=lambda: engine_defaults(1e-6, toy_lr=2e-5))


def main(given: Config) -> None:
    config = resolve(given, STAGES_BEFORE)
    config = replace(config, size_px=picture_side(config.size_px, config.init))
    if config.dry_run:
        print(plan(config))
        source = config.pairs or f"{config.num_pairs} pairs, best and worst of {config.pictures} pictures a prompt"
        print(f"{config.loop.steps} steps of {config.batch_size} pairs from {source}")
        return

    from data_pipeline.loader import Loader
    from evaluation.validation import validations
    from posttrain.objectives import DiffusionDPO
    from posttrain.preference import PairDataset, is_finished, list_judged
    from posttrain.prompts import read_prompts
    from rewards import WeightedRewards
    from training.loop import train
    from training.run_folder import RunFolder
    from training.samples import SampleHook
    from vae.autoencoder import VAE

    encoded = config.pairs is not None and (config.pairs / "dataset.json").is_file()
    folder = config.pairs if encoded else config.out / "pairs"
    if encoded or is_finished(folder, pair_settings(config)):
        missing, reward = [], None
    elif config.pairs is not None:
        missing, reward = list_judged(config.pairs), None
    else:
        missing, reward = read_prompts(config.prompts), WeightedRewards(config.rewards)

    engine = begin(config, given.init)
    try:
        run_folder = RunFolder(config.out, config, writes=engine.rank == 0)
        if missing:
            make_pairs(folder, missing, reward, config, engine)
        dataset = PairDataset(folder, config.num_pairs if config.pairs is None else None)
        engine.snapshot("reference")
        batches = Loader(
            dataset, config.batch_size, engine.dp_rank, engine.dp_size, config.loop.seed, config.max_tokens
        )
        vae = VAE.from_folder(config.components, engine.device).eval()
        shown = [dataset[i].win for i in range(min(8, len(dataset)))]
        samples = SampleHook(config.sample_every, run_folder, vae, shown, together=len(shown) if TOY else 1)
        hooks = [
            samples,
            *validations(config.validate_every, run_folder, engine, config.components, config.size_px, vae),
        ]
        train(engine, DiffusionDPO(config.beta), batches, config.loop, run_folder, hooks)
        batches.close()
    finally:
        engine.close()


def make_pairs(folder: Path, items: list, reward, config: Config, engine) -> None:
    """Draw pairs for prompts and judge them by `reward`, or encode judged pictures. UserError if that gives none."""
    from functools import partial

    from data_pipeline.encoding import Encoder
    from posttrain.preference import PairDrawing, encode_pair, write_pairs
    from training.randomness import Randomness

    painter = artist(engine, config.components)
    encoder = Encoder(painter.conditioner, painter.vae, config.size_px)
    if reward is None:
        make, wanted = partial(encode_pair, encoder), len(items)
    else:
        drawing = PairDrawing(
            painter, reward, config.size_px, config.pictures, config.min_gap, config.sampling_steps, config.cfg_scale,
            Randomness(config.loop.seed),
        )  # fmt: skip
        make, wanted = drawing.pairs, config.num_pairs
    with progress(wanted, "pairs", "pair") as bar:
        show = lambda found: bar.update(min(found, wanted) - bar.n)  # noqa: E731
        found = write_pairs(folder, pair_settings(config), items, make, wanted, encoder, engine, show)
    if not found:
        raise UserError(
            f"of {len(items)} prompts none had two pictures whose rewards differ by {config.min_gap}: train the model "
            "longer, lower --min-gap, or give --pairs"
        )


def pair_settings(config: Config) -> dict:
    """All that the pairs depend on, as JSON gives it back."""
    names = ("init", "components", "pairs", "num_pairs", "prompts", "rewards", "pictures", "min_gap", "size_px")
    values = {name: getattr(config, name) for name in (*names, "sampling_steps", "cfg_scale")} | {
        "seed": config.loop.seed
    }
    return json.loads(json.dumps(values, default=str))


if __name__ == "__main__":
    run(main, Config)
