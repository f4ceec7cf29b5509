"""The demo's stages as data: which commands run, in which order, with which lengths. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Recipe:
    """Lengths of every stage of the line."""

    pictures: int
    """Synthetic pictures to draw (text, shapes, crops of photographs)."""
    vae_steps: int
    image_decoder_steps: int
    steps_256: int
    steps_640: int
    sft_steps: int
    dpo_pairs: int
    dpo_steps: int
    grpo_steps: int
    sample_steps: int
    """Denoising steps of the pictures in the report."""


RECIPES = {
    "quick": Recipe(
        pictures=480, vae_steps=150, image_decoder_steps=40, steps_256=160, steps_640=40,
        sft_steps=20, dpo_pairs=16, dpo_steps=10, grpo_steps=4, sample_steps=12,
    ),
    "demo": Recipe(
        pictures=8000, vae_steps=1500, image_decoder_steps=300, steps_256=2400, steps_640=400,
        sft_steps=150, dpo_pairs=96, dpo_steps=60, grpo_steps=30, sample_steps=30,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One command of the line: `command` is a script of this repository and its arguments."""

    name: str
    purpose: str
    command: list[str]
    pictures: list[Path] = field(default_factory=list)
    """Files worth opening once the stage is finished."""


def stages(recipe: Recipe, out: Path, data: Path | None) -> list[Stage]:
    """The commands of a line that works in `out`, on the user's `data` or on our own."""
    raw, curated, components = out / "data" / "raw", out / "data" / "curated", out / "components"
    encoded = {"256": out / "data" / "encoded-256", "640": out / "data" / "encoded-640"}
    report = out / "report"

    def page(*, until: str) -> Stage:
        command = ["demo/report.py", "--line", str(out), "--steps", str(recipe.sample_steps)]
        return Stage(f"report-{until}", f"pictures and curves up to {until}", command, [report / "index.html"])

    def pretrain(res: str, steps: int, *init: str) -> Stage:
        command = ["pretrain/stage.py", "--res", res, "--preset", "tiny", "--data", str(encoded[res])]
        command += [
            "--components",
            str(components),
            "--steps",
            str(steps),
            "--out",
            str(out / f"pretrain-{res}"),
            *init,
        ]
        return Stage(f"pretrain-{res}", f"flow matching, stage {res}", command)

    def produce(res: str) -> Stage:
        command = ["data_pipeline/produce.py", "--data", str(curated), "--components", str(components)]
        command += ["--res", TOY_RES[res], "--out", str(encoded[res])]
        return Stage(f"produce-{res}", f"text and latents for stage {res} ({TOY_RES[res]} px here)", command)

    if data is None:
        command = ["data_pipeline/synthesize.py", "--count", str(recipe.pictures), "--size", "128", "--out", str(raw)]
        source = Stage("data", "draw words in real fonts and shapes, crop photographs", command)
    else:
        command = ["data_pipeline/ingest.py", "--data", str(data), "--out", str(raw)]
        source = Stage("data", f"read {data}", command)
    vae = ["vae/train.py", "--data", str(curated), "--size", "64"]
    run = lambda stage: str(out / stage)  # noqa: E731
    shared = ["--components", str(components), "--data", str(encoded["640"])]
    return [
        source,
        page(until="data"),
        Stage("curate", "first filters and their audit", ["data_pipeline/curate.py", "--data", str(raw), "--out", str(curated)]),
        Stage("vae", "encoder and video decoder", [*vae, "--recipe", "base", "--steps", str(recipe.vae_steps), "--out", run("vae")]),
        Stage("image-decoder", "image decoder on the frozen encoder",
              [*vae, "--recipe", "image-decoder", "--init", run("vae"), "--steps", str(recipe.image_decoder_steps), "--out", run("image-decoder")]),
        Stage("components", "text encoder, tokenizer, scheduler, VAE in one folder",
              ["demo/components.py", "--vae", run("image-decoder"), "--out", str(components)]),
        produce("256"),
        produce("640"),
        pretrain("256", recipe.steps_256),
        page(until="pretrain-256"),
        pretrain("640", recipe.steps_640, "--init", run("pretrain-256")),
        Stage("sft", "supervised fine-tuning", ["posttrain/sft.py", *shared, "--init", run("pretrain-640"),
              "--steps", str(recipe.sft_steps), "--out", run("sft")]),
        Stage("dpo", "direct preference optimisation", ["posttrain/dpo.py", "--components", str(components), "--init", run("sft"),
              "--num-pairs", str(recipe.dpo_pairs), "--steps", str(recipe.dpo_steps), "--out", run("dpo")]),
        Stage("grpo", "Flow-GRPO on the shapes reward", ["posttrain/flow_grpo.py", "--components", str(components), "--init", run("dpo"),
              "--steps", str(recipe.grpo_steps), "--out", run("grpo")]),
        Stage("export", "a diffusers folder", ["model/export.py", "--checkpoint", run("grpo"), "--output", run("export")]),
        Stage("compare", "diffusers draws it, as we do", ["demo/compare.py", "--checkpoint", run("grpo"),
              "--export", run("export"), "--out", str(report / "compare.json")]),
        page(until="export"),
    ]  # fmt: skip


TOY_RES = {"256": "64", "640": "96", "1328": "128"}
"""Side in pixels at which the tiny model plays each stage on a CPU."""
