"""Label generated pictures by hand, blind to the model, and see how well judge and reward agree with the labels.

    python evaluation/label.py                                   # a page of pictures from all evaluations so far
    python evaluation/label.py --labels runs/labels/labels.json  # agreement and Cohen's kappa

The page shows picture and prompt, nothing else: press y (right), n (wrong) or u (unclear), then save the labels.
"""

import json
from dataclasses import dataclass
from pathlib import Path

try:
    from command_line import UserError, run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class LabelConfig:
    evaluation: Path = Path("runs/evaluation")
    """Output folder of `python -m evaluation`, with the pictures of one model or several."""
    output: Path = Path("runs/labels")
    """Where the page goes."""
    count: int = 200
    """Pictures to label, drawn evenly from models and kinds of prompts."""
    seed: int = 0
    labels: Path | None = None
    """Labels that the page saved: report agreement instead of writing a page."""
    dry_run: bool = False
    """Say what would be labelled, and stop."""


def main(config: LabelConfig) -> None:
    if config.labels is not None:
        _report(config)
        return
    items = _choose(config)
    models = len({item["model"] for item in items})
    print(f"{len(items)} pictures by {models} models -> {config.output}/index.html")
    if not config.dry_run:
        _write_page(config.output, items)


def _choose(config: LabelConfig) -> list[dict]:
    """Pictures in shuffled order, taken in turn from every kind of prompt and model."""
    import numpy as np

    from evaluation.prompts import SHAPES_SHA256, shapes_prompts

    prompts = {p.id.replace("/", "-"): p for split in SHAPES_SHA256 for p in shapes_prompts(split)}
    groups: dict[tuple[str, str], list[dict]] = {}
    for file in sorted((config.evaluation / "cache").glob("shapes-*/*.png")):
        prompt = prompts[file.stem.rsplit("-", 1)[0]]
        item = {"file": str(file), "model": file.parent.name, "id": prompt.id, "prompt": prompt.text}
        groups.setdefault((prompt.stratum, file.parent.name), []).append({**item, "metadata": prompt.metadata})
    if not groups:
        raise UserError(f"no pictures in {config.evaluation}/cache; run `python -m evaluation --suite shapes` first")
    rng = np.random.default_rng(config.seed)
    queues = [[group[i] for i in rng.permutation(len(group))] for _, group in sorted(groups.items())]
    chosen: list[dict] = []
    while len(chosen) < config.count and any(queues):
        chosen += [queue.pop() for queue in queues if queue][: config.count - len(chosen)]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def _write_page(output: Path, items: list[dict]) -> None:
    import jinja2

    from data_pipeline.page import picture_uri
    from evaluation.runner import read_picture
    from files import atomic_file, write_json

    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "items.json", items)
    shown = [{"uri": picture_uri(read_picture(Path(i["file"])), 512), "prompt": i["prompt"]} for i in items]
    folders = [Path(__file__).parent, Path(__file__).parent.parent / "data_pipeline"]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folders), autoescape=True)
    with atomic_file(output / "index.html") as file:
        file.write(environment.get_template("label.html").render(title="Right or wrong?", items=shown).encode())


def _report(config: LabelConfig) -> None:
    from evaluation.agreement import agreement
    from evaluation.prompts import SHAPES_SHA256, shapes_prompts
    from evaluation.runner import read_picture
    from evaluation.suites import ShapesSuite

    items = _read(config.output / "items.json")
    labels = _read(config.labels)
    if len(labels) != len(items) or set(labels) - {"y", "n", "u", None}:
        raise UserError(f"{config.labels} should list y, n, u or null for each of {len(items)} pictures")
    kept = [(item, label == "y") for item, label in zip(items, labels, strict=True) if label in ("y", "n")]
    if not kept:
        raise UserError(f"{config.labels} labels no picture right or wrong")
    images = [read_picture(Path(item["file"])) for item, _ in kept]
    prompts = {p.id: p for split in SHAPES_SHA256 for p in shapes_prompts(split)}
    rows = ShapesSuite("validation").score(images, [prompts[item["id"]] for item, _ in kept])
    print(f"{len(kept)} labelled right or wrong ({sum(y for _, y in kept)} right), {len(items) - len(kept)} left out")
    for name in ("strict", "official", "reward"):
        a = agreement([y for _, y in kept], [v == 1 for v in rows[name]], [item["id"] for item, _ in kept])
        show = lambda v: f"{v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}]"  # noqa: E731
        print(f"{name:<8} agrees on {show(a.share)}, kappa {show(a.kappa)}")


def _read(path: Path) -> list:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from None


if __name__ == "__main__":
    run(main, LabelConfig)
