"""Flow-GRPO: draw groups of pictures, reward them, make the better ones likelier (arXiv 2505.05470).

    torchrun --nproc-per-node 8 posttrain/flow_grpo.py --init runs/dpo --prompts PROMPTS.jsonl --rewards ocr

Each update draws --prompts-per-update prompts, --group pictures of each, with random steps, and takes a clipped policy
gradient with a KL towards --init. Run the same command again to go on.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

try:
    import tyro

    from command_line import UserError, run
    from posttrain.start import TOY, RunConfig, artist, begin, engine_defaults, picture_side, plan, resolve, sample_hook
    from training.engine.config import EngineConfig
    from training.loop import LoopConfig
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

STAGES_BEFORE = ("dpo", "sft", "pretrain-1328", "pretrain-640", "pretrain-256")


@dataclass(frozen=True)
class Config(RunConfig):
    out: Path = Path("runs/grpo")
    """Folder of the run."""
    prompts: Path | None = None
    """JSON lines {"prompt": ..., ...} to draw. Default: the shapes world's training prompts."""
    rewards: tuple[str, ...] = ("shapes_soft",)
    """What judges a picture, as NAME or NAME=WEIGHT: shapes, shapes_soft, ocr."""
    prompts_per_update: int = 2 if TOY else 48
    group: int = 12 if TOY else 24
    """Pictures of each prompt, compared with each other (Flow-GRPO: 24 is stable, 12 and 6 collapse at scale)."""
    size_px: int | None = None
    """Side of the (square) pictures, a multiple of 16. Default: what --init was trained at."""
    sampling_steps: int = 10
    """Denoising steps of a picture in training; the last one is never random."""
    window: int = 2
    """Random, and trained, steps of a picture: so many in its first half; 0 for all but the last."""
    noise_level: float = 0.7
    sde: Literal["flow-grpo", "cps"] = "flow-grpo"
    """How random steps are made: Flow-GRPO's SDE, or coefficients-preserving sampling."""
    cfg_scale: float = 4.0
    """Guidance while drawing and in training, with gradient through both branches; 1 for none."""
    ratio: Literal["guard", "likelihood"] = "guard"
    """GRPO-Guard's ratio, which weighs all steps alike, or Flow-GRPO's of likelihoods, where the last ones dominate."""
    clip_range: float = 0.0256
    """Clip range of the ratio, times the square root of a latent's elements: 1e-4 at 512 px (65,536 elements)."""
    beta: float = 0.004
    """Weight of the KL towards --init, averaged over a latent's elements (Flow-GRPO's .04 at 10 steps)."""
    advantage_std: Literal["group", "batch"] = "group"
    """What a reward's distance from its group's mean is divided by."""
    updates_per_rollout: int = 1
    """Updates made from the same pictures; with 1 the ratio stays at 1 and nothing is clipped."""
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = field(
        default_factory=lambda: LoopConfig(10, save_every=5) if TOY else LoopConfig(1000, save_every=50)
    )
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=lambda: engine_defaults(3e-6, toy_lr=1e-4))


def main(given: Config) -> None:
    if given.loop.save_every % given.updates_per_rollout:
        raise UserError(
            "--save-every must be a multiple of --updates-per-rollout, so that a resumed run is the same run"
        )
    config = resolve(given, STAGES_BEFORE)
    config = replace(config, size_px=picture_side(config.size_px, config.init))

    from posttrain.prompts import read_prompts

    prompts = read_prompts(config.prompts)
    if config.dry_run:
        print(plan(config))
        print(
            f"{config.loop.steps} updates of {config.prompts_per_update} of {len(prompts)} prompts x {config.group} "
            f"pictures at {config.size_px} px, {config.window or config.sampling_steps - 1} trained steps a picture"
        )
        return

    from evaluation.validation import validations
    from posttrain.objectives import FlowGRPO
    from posttrain.rollout import Rollouts, random_steps
    from rewards import WeightedRewards
    from training.loop import train
    from training.run_folder import RunFolder

    random_steps(config.sampling_steps, config.window, 0.0)  # refuses what does not fit before anything is written
    reward = WeightedRewards(config.rewards)
    engine = begin(config, given.init)
    try:
        run_folder = RunFolder(config.out, config, writes=engine.rank == 0)
        if config.beta:
            engine.snapshot("reference")
        objective = FlowGRPO(config.clip_range, config.beta, config.ratio)
        painter = artist(engine, config.components)
        samples = sample_hook(config.sample_every, run_folder, painter, [p.text for p in prompts[:8]], config.size_px)
        batches = Rollouts(
            engine=engine,
            artist=painter,
            reward=reward,
            objective=objective,
            prompts=prompts,
            prompts_per_update=config.prompts_per_update,
            group=config.group,
            size_px=config.size_px,
            steps=config.sampling_steps,
            cfg_scale=config.cfg_scale,
            noise_level=config.noise_level,
            kind=config.sde,
            window=config.window,
            max_tokens=config.max_tokens,
            advantage_std=config.advantage_std,
            updates_per_rollout=config.updates_per_rollout,
            seed=config.loop.seed,
        )
        models = painter.vae, painter.conditioner
        hooks = [
            samples,
            *validations(config.validate_every, run_folder, engine, config.components, config.size_px, *models),
        ]
        train(engine, objective, batches, config.loop, run_folder, hooks)
    finally:
        engine.close()


if __name__ == "__main__":
    run(main, Config)
