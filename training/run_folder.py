"""The folder of a run: what it was told to do, what it measured, what it drew, where it can go on.

config.toml      every setting, resolved; `--config` takes it back
metrics.jsonl    one row a step, equal to that of a run that was never interrupted (so it holds no times)
speed.jsonl      one row a step that was made, times and rates, also of steps that an interruption undid
validation.jsonl one row a validation: scores of pictures of frozen prompts, drawn by the moving average
tensorboard/     the same, and speed
held_out.jsonl   the same of the loss on held-out samples
validation/, held_out/   what each picture, or sample, was given
samples/         pictures
checkpoints/     step_00001000/ ...
best             a link to the checkpoint that was measured best
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from command_line import read_toml, write_toml
from files import atomic_file, link, write_json
from training.engine.checkpoint import list_checkpoints, prune, step_of

HARMLESS = {
    "steps", "save_every", "keep", "keep_every", "best", "sample_every", "sample_prompts", "validate_every",
    "validation", "out", "seeds", "dry_run", "gpu",
}  # fmt: skip
"""Settings that a run may change on its way without being another run."""
MEASURES = ("held_out", "validation")
"""What hooks measure now and then."""
BEST = "best"
"""Link to the best checkpoint."""
GAINS = "gains.json"
"""What a run gained, last measurement minus first, where it measured before its first step."""


class RunFolder:
    """A run's folder, made if it is missing; only the process with `writes` touches files."""

    def __init__(self, path: Path, config: Any, writes: bool = True):
        self.path, self.writes = Path(path), writes
        self.checkpoints, self.samples = self.path / "checkpoints", self.path / "samples"
        self._metrics = self._speed = self._board = None
        self.images = 0.0
        """Samples that the rows so far have learnt from."""
        self.facts: dict[str, Any] = {}
        """What every checkpoint of the run is to say beside its cursor."""
        self._config, self._before = config, None
        if writes:
            for folder in (self.checkpoints, self.samples):
                folder.mkdir(parents=True, exist_ok=True)
            file = self.path / "config.toml"
            if file.exists() and any(self.checkpoints.iterdir()):
                self._before = read_toml(file)
                self._require_state_for(self._before, config)
            else:
                write_toml(config, file)

    def _require_state_for(self, before: dict[str, Any], config: Any) -> None:
        """ValueError if a run's optimizer has no state for what `config` would train it with."""
        had, wants = before.get("engine", {}).get("optimizer", {}), getattr(config, "engine", None)
        if wants is None or not had:
            return
        wants = wants.optimizer
        if (wants.muon_lr is None, wants.width_base) != ("muon_lr" not in had, had.get("width_base")):
            given = ", ".join(f"{n} {had[n]}" for n in ("muon_lr", "width_base") if n in had) or "AdamW alone"
            raise ValueError(
                f"{self.path} was begun with {given}, and its optimizer has no state for another: keep to it, or "
                f"start a new run from this one's weights (--init {self.path} --out ELSEWHERE)"
            )

    def open(self, step: int) -> None:
        """Begin to log after `step`: rows of later steps, from a run that died since, are cut off.

        Nothing refuses to go on after that, so the settings of a run that does are written, and what changed is said.
        """
        if not self.writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        file = self.path / "metrics.jsonl"
        rows = file.read_text().splitlines(keepends=True) if file.exists() else []
        kept = rows[:step]
        if any(json.loads(row)["step"] != i for i, row in enumerate(kept, 1)) or len(kept) < step:
            raise ValueError(f"{file} does not hold one row for each of {step} steps; restore it or start a new run")
        _replace(file, kept)
        self.images = sum(json.loads(row).get("samples") or 0 for row in kept)
        for measured in (self.path / f"{name}.jsonl" for name in MEASURES):
            if measured.exists():
                _replace(measured, [row for row in whole_rows(measured) if json.loads(row)["step"] <= step and step])
        speed = self.path / "speed.jsonl"
        if speed.exists():
            _replace(speed, whole_rows(speed))
        if self._before is not None:
            settings = self.path / "config.toml"
            write_toml(self._config, settings)
            for line in changes(self._before, read_toml(settings)):
                print(f"{self.path} goes on with other settings: {line}", flush=True)
        self._metrics, self._speed = file.open("a"), speed.open("a")
        self._board = SummaryWriter(self.path / "tensorboard", purge_step=step + 1)

    def log(self, step: int, metrics: dict[str, float], speed: dict[str, float]) -> None:
        """Append the row of a step; what is not finite becomes null. `speed`, and the images seen so far, go to a file
        of their own."""
        if not self.writes:
            return
        self.images += metrics["samples"]
        speed = {**speed, "images": self.images}
        self._metrics.write(_row(step, metrics))
        self._metrics.flush()
        self._speed.write(_row(step, speed))
        self._speed.flush()
        for name, value in {**metrics, **speed}.items():
            self._board.add_scalar(name, value, step)

    def log_scores(self, name: str, step: int, scores: dict[str, float], each: dict[str, list] | None = None) -> None:
        """Append a row to NAME.jsonl, NAME of MEASURES; what `each` picture or sample got goes to a file of its own."""
        if not self.writes:
            return
        with (self.path / f"{name}.jsonl").open("a") as file:
            file.write(_row(step, scores))
        for score, value in scores.items():
            self._board.add_scalar(f"{name}/{score}", value, step)
        if each is not None:
            (self.path / name).mkdir(exist_ok=True)
            write_json(self.path / name / f"step_{step:08d}.json", each)

    def sync(self) -> None:
        """Bring all rows to disk, as before a checkpoint that relies on them."""
        if self.writes:
            os.fsync(self._metrics.fileno())

    def tidy(self, keep: int, keep_every: int, best: str) -> None:
        """Point to the best checkpoint and delete those that are not kept (see `loop.LoopConfig`)."""
        found, place = self._best(*best.split("/", 1)) if best else None, self.path / BEST
        if found is not None:
            link(place, found.relative_to(self.path))
        prune(self.checkpoints, keep, keep_every, self.path / place.readlink() if place.is_symlink() else None)

    def _best(self, measured: str, name: str) -> Path | None:
        """The checkpoint whose step was measured best: the lowest loss, the highest of all else."""
        file = self.path / f"{measured}.jsonl"
        rows = [json.loads(row) for row in file.read_text().splitlines()] if file.exists() else []
        scores = {row["step"]: row[name] for row in rows if row.get(name) is not None}
        there = [folder for folder in list_checkpoints(self.checkpoints) if step_of(folder) in scores]
        sign = -1 if name.startswith("loss") else 1
        return max(there, key=lambda folder: sign * scores[step_of(folder)], default=None)

    def close(self) -> None:
        """Close the logs."""
        if self._metrics is not None:
            for log in (self._metrics, self._speed, self._board):
                log.close()
            self._metrics = self._speed = self._board = None


def changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two configs, in a line each; how long a run is and what it shows don't count."""
    lines = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += changes(old, new, f"{prefix}{name}.")
        elif old != new and name not in HARMLESS:
            lines.append(f"{prefix}{name} was {old}, is {new}")
    return lines


def _row(step: int, values: dict[str, float]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps({"step": step, **finite}) + "\n"


def whole_rows(file: Path) -> list[str]:
    """The lines of a file but a last one that a full disk cut."""
    return [row for row in file.read_text().splitlines(keepends=True) if row.endswith("\n")]


def _replace(file: Path, rows: list[str]) -> None:
    with atomic_file(file) as written:
        written.write("".join(rows).encode())


def read_metrics(run: Path) -> list[dict[str, float | None]]:
    """Rows of a run's metrics.jsonl."""
    return [json.loads(row) for row in (Path(run) / "metrics.jsonl").read_text().splitlines()]
