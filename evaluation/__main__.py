"""Measure a model: a run, a checkpoint, a diffusers folder or a hub id; or compare several.

    python -m evaluation --checkpoint runs/quick/sft
    python -m evaluation --compare runs/quick/sft runs/quick/grpo --suite shapes text
    torchrun --nproc-per-node 8 -m evaluation --checkpoint Qwen/Qwen-Image --height 1328 --width 1328 --suite text

Writes scores.json (value, n, 95 % interval, ceiling, floor), index.html and a sheet of the first pictures. Processes
share the work; run again after an interruption, it goes on; what was measured before is read from the cache.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

try:
    from command_line import UserError, progress, run
    from evaluation.picture_measures import PictureWeights
    from training.source import BASE, look
    from vlm.server import ServerConfig
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

SuiteName = Literal["shapes", "text", "edit", "vae", "geneval", "dpg", "oneig", "drawbench", "imgedit", "gedit"]


@dataclass(frozen=True)
class Config:
    checkpoint: str = str(BASE)
    """A run folder, a checkpoint, a diffusers folder, a hub id or a LoRA. Default: the shipped base."""
    base: Path | None = None
    """Model that LoRA files belong to, where they don't say."""
    compare: tuple[str, ...] = ()
    """Two or more of these instead: each is compared with the first, on the same prompts and seeds."""
    suite: tuple[SuiteName, ...] = ("shapes",)
    """What to measure. dpg, oneig, drawbench, imgedit, gedit are judged through --server; geneval needs --detector."""
    split: Literal["validation", "test", "test-iid", "test-compositional"] = "test"
    """Prompts of the shapes world: select on validation, test once (on both of test's kinds, or one)."""
    prompts: Path | None = None
    """Files of the one suite that is to read them: as their authors publish them (text has embedded ones)."""
    limit: int | None = None
    """Take only the first so many prompts of each suite."""
    images_per_prompt: int = 4
    height: int | None = None
    """Pixels, a multiple of 16. Default: the side that the (first) model was trained at (a published one: 1024)."""
    width: int | None = None
    steps: int = 40
    cfg_scale: float = 4.0
    """1 draws without guidance."""
    seed: int = 0
    ema: bool = True
    """Use a run's averaged weights."""
    components: Path | None = None
    """Folder with text_encoder/, tokenizer/ and vae/ (default: what the checkpoint names)."""
    raw: Path | None = None
    """Raw shards whose pictures the vae suite reconstructs (default: embedded pages and photographs)."""
    detector: Path | None = None
    """GenEval's detector: Mask2Former in transformers' layout; colours are named by --pictures.clip (ViT-L/14)."""
    pictures: PictureWeights = field(default_factory=PictureWeights)
    server: ServerConfig = field(default_factory=ServerConfig)
    inception: Path | None = None
    """Inception network as TorchScript file: FID and KID against the pictures in --real."""
    real: Path | None = None
    """Folder of real pictures."""
    output: Path = Path("runs/evaluation")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, float32 else."""
    dry_run: bool = False
    """Say what would be measured, and stop."""


def main(config: Config) -> None:
    if len(config.compare) == 1:
        raise UserError("--compare needs two models or more")
    if config.height is None or config.width is None:
        side = look((config.compare or (config.checkpoint,))[0], config.base).side_px()
        config = replace(config, height=config.height or side, width=config.width or side)
    _check(config)
    if "vae" in config.suite:
        _measure_vaes(config)
        return
    from evaluation.picture_measures import PictureMeasures
    from evaluation.report import Result, write_comparison, write_scores
    from evaluation.runner import Sampling, SuiteRun

    size = (config.height, config.width)
    sampling = Sampling(*size, config.steps, config.cfg_scale, config.images_per_prompt, config.seed)
    suites, absent = _suites(config)
    measures = PictureMeasures(config.pictures, _device(config))
    absent |= measures.absent
    prompts = [suite.prompts[: config.limit] for suite in suites]
    names = config.compare or (config.checkpoint,)
    _announce(config, names, {s.name: len(p) for s, p in zip(suites, prompts, strict=True)}, absent)
    if config.dry_run:
        return
    sources = [_source(name, config) for name in names]
    rank, world_size = _join()
    pairs = list(zip(suites, prompts, strict=True))
    cache = config.output / "cache"
    runs = [[SuiteRun(source, *pair, sampling, cache, measures) for pair in pairs] for source in sources]
    share = sum(len(batch) for mine in runs for r in mine for batch in r.batches()[rank::world_size])
    with progress(share, "evaluate", "prompt") as bar:
        for mine in runs:
            for suite_run in mine:
                suite_run.work(rank, world_size, bar.update)
    _wait(world_size)
    if rank:
        return
    settings = {**asdict(sampling), "split": config.split, "ema": config.ema, "limit": config.limit}
    which = _digest(settings, [suite.name for suite in suites], config.prompts)
    results = [[Result(r, r.read(), _distances(r, config)) for r in mine] for mine in runs]
    for source, mine in zip(sources, results, strict=True):
        folder = config.output / f"{_label(source.name)}-{source.fingerprint[:8]}-{which}"
        _show(source.name, write_scores(folder, source, settings, mine, absent)["suites"])
        print(f"wrote {folder}/scores.json and index.html")
    if len(sources) > 1:
        folder = config.output / f"{'-vs-'.join(s.fingerprint[:8] for s in sources)}-{which}"
        differences = write_comparison(folder, settings, sources, results)["differences"]
        _show_differences(differences, results[0])
        print(f"wrote {folder}/scores.json and index.html")


def _check(config: Config) -> None:
    if config.height % 16 or config.width % 16 or min(config.height, config.width) < 16:
        raise UserError(f"{config.height} x {config.width} pixels: both sides must be positive multiples of 16")
    if config.images_per_prompt < 1 or config.steps < 2 or (config.limit is not None and config.limit < 2):
        raise UserError("need at least 1 picture a prompt, 2 steps and 2 prompts")
    if not config.suite:
        raise UserError("--suite names nothing to measure")
    if "vae" in config.suite and len(config.suite) > 1:
        raise UserError("the vae suite draws nothing: measure it in a run of its own")
    if config.prompts is not None and len(set(config.suite) - {"shapes", "edit"}) != 1:
        raise UserError("--prompts belongs to one suite: measure the others in runs of their own")
    if (config.inception is None) != (config.real is None):
        raise UserError("FID and KID need both --inception FILE and --real FOLDER")


def _measure_vaes(config: Config) -> None:
    names = config.compare or (config.checkpoint,)
    print(f"reconstructions by the VAE of {', '.join(names)}")
    if config.dry_run or os.environ.get("RANK", "0") != "0":
        return
    from evaluation.vae_scores import measure_vae

    for name in names:
        which = _digest(Path(name).absolute(), config.components, config.raw, config.limit)
        folder = config.output / f"{_label(name)}-vae-{which}"
        data = measure_vae(name, config.components, config.raw, config.limit, folder)
        for domain, measures in data["suites"]["vae"].items():
            print(f"  {domain:<10}", "  ".join(f"{measure} {_interval(e)}" for measure, e in measures.items()))
        print(f"wrote {folder}/scores.json and index.html")


def _suites(config: Config) -> tuple[list, dict[str, str]]:
    """The suites asked for that can run here, and why others can't; UserError if none can."""
    makers = {
        "shapes": _shapes,
        "text": _text,
        "edit": _edit,
        "geneval": _geneval,
        **{name: partial(_judged_by_server, name) for name in ("dpg", "oneig", "drawbench", "imgedit", "gedit")},
    }
    found, absent = [], {}
    for name in config.suite:
        try:
            found += makers[name](config)
        except UserError as error:
            absent[name] = str(error)
    if not found:
        raise UserError("; ".join(f"{name}: {reason}" for name, reason in absent.items()))
    return found, absent


def _shapes(config: Config) -> list:
    from evaluation.suites import shapes_suites

    return shapes_suites(config.split)


def _text(config: Config) -> list:
    from evaluation.suites import text_suite

    return [text_suite(config.prompts)]


def _edit(config: Config) -> list:
    from evaluation.edit_suite import EditSuite

    return [EditSuite((config.height, config.width))]


def _geneval(config: Config) -> list:
    from evaluation.geneval_detector import GenEvalDetector
    from evaluation.prompts import geneval_prompts
    from evaluation.suites import GenEvalSuite

    if config.prompts is None or config.detector is None or config.pictures.clip is None:
        raise UserError(
            "geneval needs --prompts evaluation_metadata.jsonl, --detector FOLDER and --pictures.clip FOLDER"
        )
    detector = GenEvalDetector(config.detector, config.pictures.clip, _device(config))
    return [GenEvalSuite(geneval_prompts(config.prompts), detector)]


def _judged_by_server(name: str, config: Config) -> list:
    from evaluation.vlm_prompts import vlm_prompts
    from evaluation.vlm_suite import VLMSuite
    from vlm.server import ChatServer

    return [VLMSuite(name, vlm_prompts(name, config.prompts), ChatServer(config.server))]


def _distances(suite_run, config: Config) -> dict | None:
    """FID and KID of a suite's pictures, if they were asked for."""
    if config.inception is None or config.real is None:
        return None
    from evaluation.distribution import distances
    from evaluation.runner import read_picture

    files = sorted(p for p in config.real.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    return distances(suite_run.drawn(), map(read_picture, files), config.inception, _device(config))


def _device(config: Config) -> str:
    import torch

    kind = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind


def _source(name: str, config: Config):
    """The model, to be loaded when the first of its pictures is drawn."""
    import torch

    from evaluation.runner import Source
    from training.loading import fingerprint

    device = _device(config)
    kind = device.split(":")[0]
    dtype = ("bfloat16" if kind == "cuda" else "float32") if config.dtype == "auto" else config.dtype
    area = min(1024 * 1024, config.height * config.width)

    def load():
        from model.sampling.draw import Sampler
        from model.sampling.schedule import FixedSchedule
        from training.loading import load

        sampler = Sampler(FixedSchedule(config.steps), cfg_scale=config.cfg_scale)
        return load(
            name, config.ema, config.components, device, getattr(torch, dtype), config.base,
            sampler=sampler, reference_area=area,
        )  # fmt: skip

    return Source(name, fingerprint(name, config.ema, config.components, f"{kind} {dtype}", config.base), load)


def _join() -> tuple[int, int]:
    """(rank, number of processes); under torchrun they meet in a process group."""
    if "MASTER_ADDR" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    import torch
    import torch.distributed as dist

    if "OMP_NUM_THREADS" not in os.environ:  # or each would take all cores
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    return dist.get_rank(), dist.get_world_size()


def _wait(world_size: int) -> None:
    """Until every process has done its share."""
    if world_size > 1:
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()


def _announce(config: Config, names: tuple[str, ...], prompts: dict[str, int], absent: dict[str, str]) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    pictures = sum(prompts.values()) * config.images_per_prompt
    print(f"{pictures} pictures of {config.height} x {config.width} px from each of {', '.join(names)}:", end=" ")
    print(", ".join(f"{name} ({count} prompts)" for name, count in prompts.items()))
    for name, reason in absent.items():
        if name in config.suite:
            print(f"{name}: not run ({reason})")


def _label(name: str) -> str:
    return "-".join(Path(name).parts[-2:]).strip("/-")


def _digest(*settings: object) -> str:
    """Six digits by which the folders of what was measured otherwise differ."""
    return hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()[:6]


def _show(name: str, suites: dict) -> None:
    for suite, data in suites.items():
        print(f"\n{name}, {suite}")
        for measure, entry in data["scores"].items():
            print(f"  {measure:<18} {_interval(entry)}" + "".join(_control(entry, kind) for kind in entry))
        primary = data["scores"][data["primary"]]
        for kind, entry in primary["by kind"].items():
            print(f"    {kind:<16} {_interval(entry)}")


def _show_differences(differences: dict, first: list) -> None:
    primary = {result.run.suite.name: result.run.suite.primary for result in first}
    for source, suites in differences.items():
        for suite, measures in suites.items():
            entry = measures[primary[suite]]
            verdict = "significant" if entry["significant"] else "not significant"
            print(f"\n{source} minus {first[0].run.source.name}, {suite}: {_interval(entry)} ({verdict})")


def _interval(entry: dict) -> str:
    ends = "" if entry["low"] is None else f" [{entry['low']:.3f}, {entry['high']:.3f}]"
    return f"{entry['value']:.3f}{ends}"


def _control(entry: dict, kind: str) -> str:
    from evaluation.runner import CONTROLS

    return f"  {kind} {entry[kind]['value']:.3f}" if kind in CONTROLS and entry[kind] is not None else ""


if __name__ == "__main__":
    run(main, Config)
