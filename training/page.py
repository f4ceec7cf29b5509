"""The page of any run's health: curves of its logs, speed, memory, the same pictures as it went on.

    python -m training.page runs/pretrain-256

Writes health.html into the run's folder, one file that needs nothing else; while the run goes on, too.
"""

try:
    from dataclasses import dataclass
    from pathlib import Path

    import tyro

    from command_line import UserError, run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

CHARTS = {
    "loss": ("metrics", "loss"),
    "loss by noise level": ("metrics", "loss/sigma/"),
    "loss by source": ("metrics", "loss/source/"),
    "loss by size of the picture": ("metrics", "loss/size/"),
    "held-out loss": ("held_out", "loss"),
    "held-out loss by noise level": ("held_out", "loss/"),
    "validation": ("validation", ""),
    "norm of the gradient": ("metrics", "grad_norm"),
    "norm of the gradient by group": ("metrics", "grad_norm/"),
    "update / weight by group": ("metrics", "update/"),
    "learning rate": ("metrics", "lr"),
    "tokens a second": ("speed", "tokens_per_second"),
    "share of the devices' FLOP/s": ("speed", "mfu"),
    "share of a step's time that waits for data": ("speed", "data_wait"),
    "memory, GiB": ("speed", "memory_gib"),
}
"""What is drawn: the file of the run, and a name in it, or what names begin with that end in "/" (all, if empty)."""
LOGARITHMIC = {"update / weight by group"}
POINTS = 120
"""Points of a curve at most; each is then the mean of its neighbours."""
PICTURES = 8
"""Rows of samples at most."""
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Config:
    run: tyro.conf.Positional[Path] = Path("runs/pretrain-256")
    """Folder of a run."""


def main(config: Config) -> None:
    print(f"open {write_page(config.run)}", flush=True)


def write_page(folder: Path) -> Path:
    """Write health.html into a run's folder; returns it. UserError if it is no run's."""
    import jinja2

    from files import atomic_file
    from training.curves import plot_lines, png_address, read_rows

    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} holds no metrics.jsonl: give the folder of a run")
    drawn = charts(folder)
    files = sorted((folder / "samples").glob("step_*.png"))
    chosen = sorted({round(i * (len(files) - 1) / (PICTURES - 1)) for i in range(PICTURES)}) if files else []
    samples = {int(files[i].stem.removeprefix("step_")): png_address(files[i].read_bytes()) for i in chosen}
    last = (read_rows(folder / "metrics.jsonl") or [{}])[-1] | (read_rows(folder / "speed.jsonl") or [{}])[-1]
    values = {
        "name": folder.name,
        "curves": png_address(plot_lines(drawn, LOGARITHMIC)) if drawn else None,
        "samples": samples,
    }
    values |= {"last": last, "config": (folder / "config.toml").read_text()}
    template = jinja2.Template((Path(__file__).parent / "page.html").read_text(), autoescape=True)
    with atomic_file(folder / "health.html") as file:
        file.write(template.render(values).encode())
    return folder / "health.html"


def charts(folder: Path) -> dict[str, dict[str, Points]]:
    """Points (step, value) of the lines of each of CHARTS that has some."""
    from training.curves import read_rows

    rows = {name: read_rows(folder / f"{name}.jsonl") for name in {file for file, _ in CHARTS.values()}}
    found = {}
    for title, (file, name) in CHARTS.items():
        prefix = name if name.endswith("/") or not name else None
        names = {n: None for row in rows[file] for n in row if n != "step"}
        wanted = [n for n in names if (n.startswith(prefix) if prefix is not None else n == name)]
        lines = {n.removeprefix(prefix or ""): _points(rows[file], n) for n in sorted(wanted)}
        if lines := {label: points for label, points in lines.items() if points}:
            found[title] = lines
    return found


def _points(rows: list[dict], name: str) -> Points:
    """The rows' points, by no more than POINTS means of neighbours. Of steps that were done twice both count."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    size = -(-len(points) // POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(sum(values) / len(group) for values in zip(*group, strict=True)) for group in groups]


if __name__ == "__main__":
    run(main, Config)
