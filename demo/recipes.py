"""The demo's stages as data: which commands run, in which order, with which lengths. Imports no torch."""

from dataclasses import dataclass, replace
from pathlib import Path

from training.source import BASE, TOY_SIDE_PX


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
    steps_256: int
    steps_640: int
    flags_256: tuple[str, ...]
    flags_640: tuple[str, ...]
    """More flags of pretraining's stages."""
    sft_steps: int
    dpo_pairs: int
    dpo_steps: int
    grpo_steps: int
    sample_steps: int
    """Denoising steps of the pictures in the report."""
    validate: bool
    """Whether every trainer draws frozen prompts at its end, which the judge scores."""


RECIPES = {
    "quick": Recipe(
        pictures=480,
        kinds="text,shapes,photo",
        picture_px=128,
        components=None,
        vae_steps=80,
        image_decoder_steps=40,
        batch_size=16,
        steps_256=140,
        steps_640=24,
        flags_256=(),
        flags_640=(),
        sft_steps=8,
        dpo_pairs=12,
        dpo_steps=6,
        grpo_steps=3,
        sample_steps=10,
        validate=False,
    ),
    "demo": Recipe(
        pictures=16000,
        kinds="square-shapes:20,text,photo",
        picture_px=96,
        components=BASE,
        vae_steps=0,
        image_decoder_steps=0,
        batch_size=64,
        steps_256=2000,
        steps_640=240,
        flags_256=("--lr", "4e-3", "--muon-lr", ".04", "--warmup-steps", "50", "--ema-decay", ".998"),
        flags_640=("--lr", "1e-3", "--muon-lr", ".01"),
        sft_steps=40,
        dpo_pairs=96,
        dpo_steps=40,
        grpo_steps=20,
        sample_steps=30,
        validate=True,
    ),
}


@dataclass(frozen=True)
class Stage:
    """One command of the line: `command` is a script of this repository and its arguments."""

    name: str
    purpose: str
    command: list[str]
    page: Path | None = None
    """What is worth opening once the stage is finished."""


def stage(name: str, purpose: str, *command: object) -> Stage:
    """A stage without a page."""
    return Stage(name, purpose, [str(word) for word in command])


def stages(recipe: Recipe, out: Path, data: Path | None) -> list[Stage]:
    """The commands of a line that works in `out`, on the user's `data` or on our own."""
    raw, curated, report = out / "data" / "raw", out / "data" / "curated", out / "report"
    components, encoded = out / "components", {res: out / "data" / f"encoded-{res}" for res in (256, 640)}

    def page(after: str) -> Stage:
        command = ["demo/report.py", "--line", str(out), "--steps", str(recipe.sample_steps)]
        return Stage(f"report-{after}", f"the page so far, after {after}", command, report / "index.html")

    def vae(name: str, purpose: str, decoder: str, steps: int, *more: object) -> Stage:
        common = [
            "vae/train.py",
            "--recipe",
            decoder,
            "--preset",
            "tiny",
            "--data",
            curated,
            "--size",
            64,
            "--steps",
            steps,
        ]
        return stage(name, purpose, *common, "--out", out / name, *more)

    def produce(res: int) -> Stage:
        purpose = f"text and latents for stage {res}, at {TOY_SIDE_PX[res]} px here"
        common = ["data_pipeline/produce.py", "--data", curated, "--components", components]
        return stage(f"produce-{res}", purpose, *common, "--res", TOY_SIDE_PX[res], "--out", encoded[res])

    def train(name: str, purpose: str, script: str, steps: int, *more: object) -> Stage:
        common = [script, "--components", components, "--steps", steps, "--out", out / name]
        common += ["--validate-every", steps if recipe.validate else 0]
        return stage(name, purpose, *common, *more)

    def pretrain(res: int, steps: int, *more: object) -> Stage:
        where = ["--res", res, "--preset", "tiny", "--data", encoded[res], "--batch-size", recipe.batch_size]
        where += ["--sample-every", steps, "--schedule", "cosine"]
        if recipe.components is not None:
            where += ["--dtype", fast_dtype()]
        return train(f"pretrain-{res}", f"flow matching, stage {res}", "pretrain/stage.py", steps, *where, *more)

    if data is None:
        draw = ["data_pipeline/synthesize.py", "--kinds", recipe.kinds]
        draw += ["--count", recipe.pictures, "--size", recipe.picture_px, "--out", raw]
        source = stage("data", "words in real fonts, shapes, crops of photographs", *draw)
    else:
        source = stage("data", f"pictures of {data}", "data_pipeline/ingest.py", "--data", data, "--out", raw)
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
    return [
        source,
        page("data"),
        stage("curate", "first filters and their audit", "data_pipeline/curate.py", "--data", raw, "--out", curated),
        *make_components,
        produce(256),
        produce(640),
        pretrain(256, recipe.steps_256, *recipe.flags_256),
        page("pretrain-256"),
        pretrain(640, recipe.steps_640, "--init", out / "pretrain-256", *recipe.flags_640),
        train("sft", "supervised fine-tuning", "posttrain/sft.py", recipe.sft_steps, *sft_data),
        train("dpo", "direct preference optimisation", "posttrain/dpo.py", recipe.dpo_steps,
              "--init", out / "sft", "--num-pairs", recipe.dpo_pairs),
        train("grpo", "Flow-GRPO", "posttrain/flow_grpo.py", recipe.grpo_steps, "--init", out / "dpo"),
        stage("export", "a diffusers folder", "model/export.py", "--checkpoint", last, "--output", export),
        stage("compare", "diffusers draws the same", "demo/compare.py", "--checkpoint", last,
              "--export", export, "--out", report / "compare.json"),
        page("export"),
    ]  # fmt: skip


def base_stages(out: Path) -> list[Stage]:
    """The commands that make, in `out`/base, what is shipped in BASE."""
    raw, base = out / "raw", out / "base"
    draw = ["data_pipeline/synthesize.py", "--kinds", "square-shapes:8,text,photo", "--count", 8000, "--size", 64]
    common = ["--preset", "tiny", "--data", raw, "--size", 64, "--crop", 64, "--batch-size", 24, "--save-every", 300]
    base_vae = ["vae/train.py", "--recipe", "base", *common, "--clip-share", 0.05, "--steps", 1500]
    decoder = ["vae/train.py", "--recipe", "image-decoder", *common, "--steps", 600, "--init", out / "vae"]
    put = ["demo/components.py", "--vae", out / "image-decoder", "--text-steps", 300, "--dtype", "bfloat16"]
    return [
        stage("data", "whole pictures at 64 px", *draw, "--seed", 11, "--out", raw),
        stage("vae", "encoder and video decoder", *base_vae, "--out", out / "vae"),
        stage("image-decoder", "encoder frozen", *decoder, "--out", out / "image-decoder"),
        replace(stage("components", "the text encoder learns to read", *put, "--out", base), page=base),
    ]


def fast_dtype() -> str:
    """bfloat16 on a CPU that multiplies it in hardware (AMX), else float32."""
    cpu = Path("/proc/cpuinfo")
    return "bfloat16" if cpu.exists() and "amx_bf16" in cpu.read_text() else "float32"
