"""Supervised fine-tuning: flow matching on curated pictures, from a pretrained model.

    torchrun --nproc-per-node 8 posttrain/sft.py --init runs/pretrain-1328 --data DATA

The loss is pretraining's. Run the same command again to go on.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

try:
    import tyro

    from command_line import UserError, run
    from posttrain.start import TOY, RunConfig, begin, engine_defaults, picture_side, plan, resolve, trained_with
    from training.demo_data import FOLDER, MODEL, TOY_SIDE_PX
    from training.engine.config import EngineConfig
    from training.loop import LoopConfig
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

STAGES_BEFORE = ("pretrain-1328", "pretrain-640", "pretrain-256")


@dataclass(frozen=True)
class Config(RunConfig):
    out: Path = Path("runs/sft")
    """Folder of the run."""
    data: tuple[Path, ...] = ()
    """Encoded data sets (of data_pipeline/produce.py). Default: what --init was trained on."""
    batch_size: int = 32 if TOY else 512
    """Samples in a step, over all ranks."""
    condition_dropout: float = 0.1
    """Probability that a sample trains with the empty prompt, for guidance."""
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = field(
        default_factory=lambda: LoopConfig(50, save_every=25) if TOY else LoopConfig(10_000, save_every=500)
    )
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=lambda: engine_defaults(2e-5, toy_lr=1e-4))


def main(given: Config) -> None:
    config = resolve(given, STAGES_BEFORE)
    config = replace(config, data=config.data or default_data(config))
    if config.dry_run:
        print(plan(config))
        print(f"{config.loop.steps} steps of {config.batch_size} samples of {', '.join(map(str, config.data))}")
        return

    from data_pipeline.loader import EncodedDataset, Loader
    from evaluation.validation import validations
    from training.loop import train
    from training.objective import VelocityMSE
    from training.run_folder import RunFolder
    from training.samples import SampleHook
    from vae.autoencoder import VAE

    dataset = EncodedDataset(config.data, mixed_resolutions=True)
    engine = begin(config, given.init)
    try:
        run_folder = RunFolder(config.out, config, writes=engine.rank == 0)
        batches = Loader(
            dataset, config.batch_size, engine.dp_rank, engine.dp_size, config.loop.seed, config.max_tokens
        )
        vae = VAE.from_folder(config.components, engine.device).eval()
        shown = [dataset[i] for i in range(min(8, len(dataset)))]
        samples = SampleHook(config.sample_every, run_folder, vae, shown, together=len(shown) if TOY else 1)
        objective = VelocityMSE(condition_dropout=config.condition_dropout)
        side_px = picture_side(None, config.init)
        hooks = [samples, *validations(config.validate_every, run_folder, engine, config.components, side_px, vae)]
        train(engine, objective, batches, config.loop, run_folder, hooks)
        batches.close()
    finally:
        engine.close()


def default_data(config: Config) -> tuple[Path, ...]:
    """The data that --init was trained on; UserError if it names none."""
    if found := tuple(map(Path, trained_with(config.init).get("data", ()))):
        return found
    if config.init == MODEL:
        return (FOLDER / f"encoded-{TOY_SIDE_PX[256]}",)
    raise UserError(f"{config.init} names no data; give --data: encoded shards of data_pipeline/produce.py")


if __name__ == "__main__":
    run(main, Config)
