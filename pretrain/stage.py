"""Pretrain one stage of the curriculum: flow matching at 256, 640 or 1328 pixels.

    torchrun --nproc-per-node 8 pretrain/stage.py --res 1328 --init runs/pretrain-640 --data DATA --components FOLDER

Run the same command again to go on. The defaults shown are those of the stage and preset given with --res, --preset.
"""

import sys
from dataclasses import replace
from pathlib import Path

try:
    from command_line import UserError, run
    from pretrain.plan import plan
    from pretrain.recipes import StageConfig, recipe
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


def main(config: StageConfig) -> None:
    if config.dry_run:
        print(plan(config))
        return
    config = with_data(config)

    from data_pipeline.loader import Loader
    from training.engine.checkpoint import list_checkpoints
    from training.engine.step import Engine
    from training.loop import train
    from training.objective import VelocityMSE
    from training.run_folder import RunFolder
    from training.starting_point import fill_weights

    dataset = open_data(config)
    engine = Engine(config.model, config.engine, config.loop.steps)
    try:
        run_folder = RunFolder(config.out, config, writes=engine.rank == 0)
        if engine.rank == 0:
            print(
                f"{config.preset} MMDiT ({config.model.num_parameters:,} parameters) on {engine.world_size} "
                f"{engine.device.type} process(es), stage {config.res} at {config.side_px} px, "
                f"{len(dataset)} samples of {', '.join(map(str, config.data))} -> {config.out}",
                flush=True,
            )
        if not list_checkpoints(run_folder.checkpoints):
            fill_weights(engine, config.init, config.loop.seed)
        batches = Loader(
            dataset, config.batch_size, engine.dp_rank, engine.dp_size, config.loop.seed, config.max_tokens
        )
        objective = VelocityMSE(config.density, condition_dropout=config.condition_dropout)
        train(engine, objective, batches, config.loop, run_folder, hooks(config, engine, run_folder, dataset))
        batches.close()
    finally:
        engine.close()


def with_data(config: StageConfig) -> StageConfig:
    """The config with its default folders; UserError for one that does not exist."""
    config = replace(config, out=config.out or Path(f"runs/pretrain-{config.res}"))
    for path in (*config.data, config.components):
        if path is not None and not path.exists():
            raise UserError(f"{path} does not exist")
    if config.data:
        return config
    if config.preset != "tiny":
        raise UserError(f"preset {config.preset} needs --data: encoded shards of data_pipeline/produce.py")
    from training.demo_data import demo_data

    data, components = demo_data(config.side_px)
    return replace(config, data=(data,), components=config.components or components)


def open_data(config: StageConfig):
    """The encoded data set; UserError if it is of another width or resolution than the stage's."""
    from data_pipeline.loader import EncodedDataset

    dataset = EncodedDataset(config.data)
    if dataset.fingerprint.resolution != config.side_px:
        raise UserError(
            f"{config.data[0]} was encoded at {dataset.fingerprint.resolution} px, stage {config.res} of preset "
            f"{config.preset} trains at {config.side_px} px; produce it with --res {config.side_px}"
        )
    if dataset.txt_empty.shape[-1] != config.model.joint_attention_dim:
        raise UserError(
            f"{config.data[0]} holds text states of width {dataset.txt_empty.shape[-1]}, preset {config.preset} takes "
            f"{config.model.joint_attention_dim}; encode it with that text encoder or choose another preset"
        )
    return dataset


def hooks(config: StageConfig, engine, run_folder, dataset) -> list:
    """Pictures and validation, if there are a VAE and a text encoder for them."""
    if config.components is None:
        return []
    from evaluation.validation import validations
    from training.samples import SampleHook
    from vae.autoencoder import VAE

    vae = VAE.from_folder(config.components, engine.device).eval()
    prompts = [dataset[i] for i in range(min(8, len(dataset)))]
    together = 8 if config.preset == "tiny" else 1
    samples = SampleHook(config.sample_every, run_folder, vae, prompts, together=together)
    return [samples, *validations(config.validate_every, run_folder, engine, config.components, config.side_px, vae)]


def defaults(argv: list[str]) -> StageConfig:
    """The recipe of the stage and preset that the command line names."""

    def flag(name: str) -> str | None:
        values = [b for a, b in zip(argv, argv[1:], strict=False) if a == name]
        values += [a.split("=", 1)[1] for a in argv if a.startswith(f"{name}=")]
        return values[-1] if values else None

    res, preset = flag("--res") or "256", flag("--preset")
    if not res.isdigit():
        return recipe(256, preset)  # the flags' parser says what is wrong
    return recipe(int(res), preset)


if __name__ == "__main__":
    try:
        chosen = defaults(sys.argv[1:])
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    run(main, chosen)
