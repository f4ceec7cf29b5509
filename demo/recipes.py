"""The demo's stages as data: which commands run, in which order, with which lengths. Imports no torch."""

import hashlib
import json
import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from training.cost.cards import count_gpus
from training.engine.config import fast_dtype
from training.own_pictures import stamp
from training.source import BASE, TOY_SIDE_PX
from training.start import TOY_VALIDATION

GUIDANCE = 2.5
"""Of the pictures that are shown and judged: the best of 1, 2.5 and 4 on validation prompts."""

NOISY = ("--density-mean", "1")
"""More of the high noise levels (docs/demo-pilot.md)."""


@dataclass(frozen=True)
class Recipe:
    """Lengths of every stage of the line."""

    pictures: int
    """Synthetic pictures to draw."""
    kinds: str
    """Their kinds with shares, as `data_pipeline/synthesize.py` takes them."""
    picture_px: int
    """Their side, or that of the square that has their area."""
    components: Path | None
    """Trained tokenizer, text encoder and VAE to use; None: the line makes its own."""
    vae_steps: int
    image_decoder_steps: int
    batch_size: int
    """Samples in a step of pretraining and fine-tuning."""
    processes: int
    """Of each trainer and of the judge. On two cores, two processes draw faster than one with two threads (96 px: 400
    prompts judged in 88 s, not 126); a step of pretraining takes as long."""
    steps_256: int
    steps_640: int
    flags_256: tuple[str, ...]
    flags_640: tuple[str, ...]
    """More flags of pretraining's stages."""
    steps_own: tuple[int, int]
    """Of both stages on the user's pictures, whose steps take longer: sizes are mixed, so nothing is compiled."""
    sft_steps: int
    dpo_pairs: int
    dpo_steps: int
    flags_dpo: tuple[str, ...]
    grpo_steps: int
    flags_grpo: tuple[str, ...]
    sample_steps: int
    """Denoising steps of the pictures in the report."""
    test_prompts: int
    """Test prompts, two pictures each, by which the first and the last model are judged; trainers draw some validation
    prompts at their end. 0 for neither."""


RECIPES = {
    "quick": Recipe(
        pictures=480,
        kinds="text,shapes,photo",
        picture_px=128,
        components=None,
        vae_steps=80,
        image_decoder_steps=40,
        batch_size=16,
        processes=1,
        steps_256=140,
        steps_640=24,
        flags_256=(),
        flags_640=(),
        steps_own=(140, 24),
        sft_steps=8,
        dpo_pairs=12,
        dpo_steps=6,
        flags_dpo=("--pictures", "4", "--min-gap", ".01", "--batch-size", "16"),  # noise differs in little
        grpo_steps=3,
        flags_grpo=("--prompts-per-update", "2", "--cfg-scale", "4"),
        sample_steps=10,
        test_prompts=0,
    ),
    "demo": Recipe(
        pictures=20000,
        kinds="neat-shapes",
        picture_px=96,
        components=BASE,
        vae_steps=0,
        image_decoder_steps=0,
        batch_size=128,
        processes=2,
        steps_256=750,
        steps_640=850,
        flags_256=("--lr", "8e-3", "--muon-lr", ".1", "--warmup-steps", "50", "--ema-decay", ".997", *NOISY),
        flags_640=("--lr", "4e-3", "--muon-lr", ".05", "--ema-decay", ".995", *NOISY),
        steps_own=(500, 250),
        sft_steps=12,
        dpo_pairs=120,
        dpo_steps=10,
        flags_dpo=(),
        grpo_steps=12,
        flags_grpo=(),
        sample_steps=20,
        test_prompts=400,
    ),
}


@dataclass(frozen=True)
class Stage:
    """One command of the line: `command` is a script of this repository and its arguments, or torchrun before them."""

    name: str
    purpose: str
    command: list[str]
    page: Path | None = None
    """What is worth opening once the stage is finished."""
    reads: str = ""
    """Stands for files of the user's that the command reads; changes when they do."""

    def __str__(self) -> str:
        """The command as one types it."""
        return shlex.join(self.command if self.command[0] == "torchrun" else ["python", *self.command])


def stage(name: str, purpose: str, *command: object) -> Stage:
    """A stage without a page."""
    return Stage(name, purpose, [str(word) for word in command])


def stages(recipe: Recipe, out: Path, data: Path | None, seed: int = 0, skip_bad: bool = False) -> list[Stage]:
    """The commands of a line that works in `out`, on the user's `data` or on our own; `seed` is every stage's."""
    seeded = ["--seed", seed] if seed else []
    processes = min(recipe.processes, count_gpus() or recipe.processes)
    ranks = ["torchrun", "--nproc-per-node", processes] if processes > 1 else []
    raw, curated, report = out / "data" / "raw", out / "data" / "curated", out / "report"
    components, encoded = out / "components", {res: out / "data" / f"encoded-{res}" for res in (256, 640)}

    def page(after: str) -> Stage:
        command = ["demo/report.py", "--line", str(out), "--steps", str(recipe.sample_steps)]
        command += ["--cfg-scale", str(GUIDANCE)]
        return Stage(f"report-{after}", f"the page so far, after {after}", command, report / "index.html")

    def vae(name: str, purpose: str, decoder: str, steps: int, *more: object) -> Stage:
        common = ["vae/train.py", "--recipe", decoder, "--preset", "tiny", "--data", curated, "--size", 64]
        common += ["--steps", steps, "--out", out / name, *seeded]
        return stage(name, purpose, *common, *more)

    def produce(res: int) -> Stage:
        purpose = f"text and latents for stage {res}, at {TOY_SIDE_PX[res]} px here"
        common = ["data_pipeline/produce.py", "--data", curated, "--components", components]
        return stage(f"produce-{res}", purpose, *common, "--res", TOY_SIDE_PX[res], "--out", encoded[res])

    def train(name: str, purpose: str, script: str, steps: int, *more: object) -> Stage:
        common = [*ranks, script, "--components", components, "--steps", steps, "--out", out / name]
        common += ["--validate-every", steps if recipe.test_prompts else 0]
        common += ["--validation", TOY_VALIDATION, *seeded]
        return stage(name, purpose, *common, *more)

    def pretrain(res: int, steps: int, *more: object) -> Stage:
        where = ["--res", res, "--preset", "tiny", "--data", encoded[res], "--batch-size", recipe.batch_size]
        where += ["--sample-every", 0 if recipe.test_prompts else steps, "--schedule", "cosine"]
        if recipe.components is not None:
            where += ["--max-tokens", 16384, "--save-every", 250, "--final-lr-ratio", 0.01, "--held-out", 0]
            where += fast_flags(data is None)
        else:
            where += ["--held-out", 0]
        return train(f"pretrain-{res}", f"flow matching, stage {res}", "pretrain/stage.py", steps, *where, *more)

    def judge(run: str) -> list[Stage]:
        if not recipe.test_prompts or data is not None:
            return []
        common = [*ranks, "evaluation/__main__.py", "--checkpoint", out / run, "--split", "test-iid"]
        common += ["--images-per-prompt", 2, "--limit", recipe.test_prompts]
        common += ["--steps", recipe.sample_steps, "--cfg-scale", GUIDANCE, "--dtype", fast_dtype()]
        return [stage(f"judge-{run}", f"test prompts, drawn by {run} and judged", *common, "--output", out / "judged")]

    if data is None:
        draw = ["data_pipeline/synthesize.py", "--kinds", recipe.kinds]
        draw += ["--count", recipe.pictures, "--size", recipe.picture_px, "--out", raw, *seeded]
        source = stage("data", f"synthetic pictures: {recipe.kinds}", *draw)
    else:
        ingest = ["data_pipeline/ingest.py", "--data", data, *(["--skip-bad"] if skip_bad else []), "--out", raw]
        source = replace(
            stage("data", f"pictures of {data}", *ingest),
            reads=hashlib.sha256(json.dumps(stamp(data)).encode()).hexdigest(),
        )
    steps_256, steps_640 = (recipe.steps_256, recipe.steps_640) if data is None else recipe.steps_own
    last, export = out / "grpo", out / "export"
    if recipe.components is None:
        own = ["demo/components.py", "--vae", out / "image-decoder", "--out", components]
        make_components = [
            vae("vae", "encoder and video decoder", "base", recipe.vae_steps),
            vae("image-decoder", "encoder frozen", "image-decoder", recipe.image_decoder_steps, "--init", out / "vae"),
            stage("components", "text encoder too", *own),
        ]
    else:
        shipped = ["demo/components.py", "--copy", recipe.components, "--out", components]
        make_components = [stage("components", "the shipped tokenizer, text encoder and VAE", *shipped)]
    sft_data = ["--data", encoded[640], "--init", out / "pretrain-640", "--batch-size", recipe.batch_size]
    # Pretraining has seen every sample, so none is left to hold out.
    sft_data += ["--held-out", 0, *(["--dtype", fast_dtype()] if recipe.components is not None else [])]
    # Pictures of a model of the user's own differ little by the reward of shapes.
    flags_dpo = recipe.flags_dpo if data is None or recipe.flags_dpo else ("--min-gap", "1e-3")
    return [
        source,
        page("data"),
        stage("curate", "first filters and their audit", "data_pipeline/curate.py", "--data", raw, "--out", curated),
        *make_components,
        produce(256),
        produce(640),
        pretrain(256, steps_256, *recipe.flags_256),
        *judge("pretrain-256"),
        page("pretrain-256"),
        pretrain(640, steps_640, "--init", out / "pretrain-256", *recipe.flags_640),
        train("sft", "supervised fine-tuning", "posttrain/sft.py", recipe.sft_steps, *sft_data),
        train("dpo", "direct preference optimisation", "posttrain/dpo.py", recipe.dpo_steps,
              "--init", out / "sft", "--num-pairs", recipe.dpo_pairs, *flags_dpo),
        train("grpo", "Flow-GRPO", "posttrain/flow_grpo.py", recipe.grpo_steps,
              "--init", out / "dpo", *recipe.flags_grpo),
        *judge("grpo"),
        stage("export", "a diffusers folder", "model/export.py", "--checkpoint", last, "--output", export),
        stage("compare", "diffusers draws the same", "demo/compare.py", "--checkpoint", last,
              "--export", export, "--out", report / "compare.json"),
        page("export"),
    ]  # fmt: skip


def base_stages(out: Path) -> list[Stage]:
    """The commands that make, in `out`/base, what is shipped in BASE."""
    raw, components, world, encoded, run = (out / name for name in ("raw", "components", "world", "encoded", "run"))
    draw = ["data_pipeline/synthesize.py", "--kinds", "square-shapes:8,text,photo", "--count", 8000, "--size", 64]
    common = ["--preset", "tiny", "--data", raw, "--size", 64, "--crop", 64, "--batch-size", 24, "--save-every", 300]
    base_vae = ["vae/train.py", "--recipe", "base", *common, "--clip-share", 0.05, "--steps", 1500]
    decoder = ["vae/train.py", "--recipe", "image-decoder", *common, "--steps", 600, "--init", out / "vae"]
    put = ["demo/components.py", "--vae", out / "image-decoder", "--text-steps", 300, "--no-video"]
    shapes = ["data_pipeline/synthesize.py", "--kinds", "square-shapes", "--count", 64000, "--size", 64, "--seed", 5]
    train = ["pretrain/stage.py", "--res", 256, "--preset", "tiny", "--data", encoded, "--components", components]
    train += ["--batch-size", 128, "--max-tokens", 8192, "--steps", 8000, "--lr", "8e-3", "--muon-lr", ".1"]
    train += ["--warmup-steps", 50, "--schedule", "cosine", "--final-lr-ratio", 0.01, "--ema-decay", ".997"]
    train += ["--save-every", 500, "--held-out", 400, "--validate-every", 1000, "--sample-every", 1000, *fast_flags()]
    export = ["model/export.py", "--checkpoint", run, "--dtype", "bfloat16", "--output", out / "base"]
    return [
        stage("data", "whole pictures at 64 px", *draw, "--seed", 11, "--out", raw),
        stage("vae", "encoder and video decoder", *base_vae, "--out", out / "vae"),
        stage("image-decoder", "encoder frozen", *decoder, "--out", out / "image-decoder"),
        stage("components", "the text encoder learns to read", *put, "--dtype", "bfloat16", "--out", components),
        stage("world", "shapes to learn from", *shapes, "--out", world),
        stage("produce", "their text and latents", "data_pipeline/produce.py", "--data", world,
              "--components", components, "--res", 64, "--out", encoded),
        stage("pretrain", "flow matching", *train, "--out", run),
        replace(stage("export", "what is shipped", *export), page=out / "base"),
    ]  # fmt: skip


def fast_flags(alike: bool = True) -> list[str]:
    """Flags that make training on this machine faster: `fast_dtype`, and compiled blocks for pictures that are alike.

    Compiling takes a compiler, and no space in the path of Python's libraries, which torch's generator does not quote.
    """
    compiles = alike and (shutil.which("c++") or shutil.which("g++")) and " " not in sys.prefix
    return ["--dtype", fast_dtype(), *(["--compile"] if compiles else [])]
