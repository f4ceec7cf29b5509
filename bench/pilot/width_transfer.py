"""Does the best learning rate of one width hold at another? Loss over rate at three widths, for three ways to scale it.

    adamw        one rate for all parameters
    adamw 1/w    matrices that grow with the width at base / width times the rate (`width_base`)
    muon         Muon's rate on the blocks' matrices; AdamW's for the rest stays, and follows the width

Every run is short, of the same samples and draws, with the same schedule (wsd); its loss is the mean over the last
fifth of its steps. A finished run is a row of OUT/runs.jsonl, so that the same command goes on where it stopped;
OUT/loss.png is drawn at the end, with each width's best rate marked.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from command_line import progress, run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

from training.curves import read_rows

if TYPE_CHECKING:
    from training.engine.config import OptimizerConfig

HEAD_DIM = 48
LAST = 5
"""A run's loss is over the last of so many equal parts."""
METHODS = ("adamw", "adamw 1/w", "muon")


@dataclass(frozen=True)
class Config:
    widths: tuple[int, ...] = (96, 192, 384)
    """Multiples of 48, a head each."""
    base: int = 192
    """The width at which rates mean the same with and without scaling."""
    layers: int = 2
    adamw_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    muon_rates: tuple[float, ...] = (5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 0.16, 0.32)
    beside_muon: float = 4e-3
    """AdamW's rate beside Muon, at the base width."""
    steps: int = 200
    batch_size: int = 32
    seed: int = 0
    data: Path | None = None
    """Encoded data set of pictures of about 64 px. Default: the demo's, made if it is missing."""
    out: Path = Path("runs/width-transfer")


def main(config: Config) -> None:
    if config.data is None:
        from training.demo_data import demo_data

        config = Config(**{**asdict(config), "data": demo_data(64)})
    config.out.mkdir(parents=True, exist_ok=True)
    log = config.out / "runs.jsonl"
    done = {json.dumps(row["run"]): row["loss"] for row in read_rows(log)}
    wanted = [(method, width, rate) for method in METHODS for rate in rates(config, method) for width in config.widths]
    losses: dict[tuple[str, int, float], float] = {}
    with progress(len(wanted), "width transfer", "run") as bar:
        for method, width, rate in wanted:
            if method == "adamw 1/w" and width == config.base:
                losses[method, width, rate] = losses["adamw", width, rate]
            else:
                setting = [method, width, rate, config.layers, config.steps, config.batch_size, config.base]
                setting += [config.beside_muon, config.seed, str(config.data)]
                if json.dumps(setting) not in done:
                    begin = time.perf_counter()
                    loss = last_loss(config, method, width, rate)
                    row = {"run": setting, "loss": loss, "seconds": time.perf_counter() - begin}
                    with log.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    done[json.dumps(setting)] = loss
                loss = done[json.dumps(setting)]
                losses[method, width, rate] = math.inf if loss is None else loss
            bar.update()
    for method in METHODS:
        for width in config.widths:
            best = min(rates(config, method), key=lambda rate: losses[method, width, rate])
            print(f"{method:10s} width {width}: best rate {best:g}, loss {losses[method, width, best]:.4f}")
    draw(config, losses)


def rates(config: Config, method: str) -> tuple[float, ...]:
    """The rates at which a method is tried."""
    return config.muon_rates if method == "muon" else config.adamw_rates


def optimizer(config: Config, method: str, rate: float) -> "OptimizerConfig":
    """A method's settings at a rate."""
    from training.engine.config import OptimizerConfig

    given = {"lr": config.beside_muon, "muon_lr": rate} if method == "muon" else {"lr": rate}
    base = None if method == "adamw" else config.base
    return OptimizerConfig(**given, warmup_steps=config.steps // 10, schedule="wsd", decay_share=0.3, width_base=base)


def last_loss(config: Config, method: str, width: int, rate: float) -> float | None:
    """The mean loss over the end of a run; None for one that is not finite."""
    from data_pipeline.live import open_dataset
    from data_pipeline.loader import Loader
    from model.config import PRESETS, MMDiTConfig
    from training.engine.config import EngineConfig, fast_dtype
    from training.engine.step import Engine
    from training.flow_matching import VelocityMSE
    from training.randomness import Randomness

    tiny = PRESETS["tiny"]
    model = MMDiTConfig(
        config.layers, width // HEAD_DIM, HEAD_DIM, joint_attention_dim=tiny.joint_attention_dim,
        axes_dims_rope=tiny.axes_dims_rope,
    )  # fmt: skip
    settings = EngineConfig(optimizer=optimizer(config, method, rate), dtype=fast_dtype())
    engine = Engine(model, settings, config.steps)
    engine.initialize(config.seed)
    batches = Loader(open_dataset((config.data,)), config.batch_size, 0, 1, config.seed, 8192, width=width)
    losses = []
    for _ in range(config.steps):
        losses.append(engine.step(VelocityMSE(), next(batches), Randomness(config.seed))["loss"])
    batches.close()
    engine.close()
    last = losses[-max(1, config.steps // LAST) :]
    mean = sum(last) / len(last)
    return mean if math.isfinite(mean) else None


def draw(config: Config, losses: dict[tuple[str, int, float], float]) -> None:
    """Plot the loss over the rate, a panel for each method and a line for each width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(METHODS), figsize=(4 * len(METHODS), 3.2), sharey=True)
    best_of = [min(losses[m, w, rate] for rate in rates(config, m)) for m in METHODS for w in config.widths]
    for axis, method in zip(axes, METHODS, strict=True):
        for width in config.widths:
            tried = rates(config, method)
            values = [losses[method, width, rate] for rate in tried]
            (line,) = axis.plot(tried, values, marker=".", label=f"width {width}")
            best = min(range(len(tried)), key=values.__getitem__)
            axis.plot(tried[best], values[best], marker="*", ms=12, color=line.get_color())
        axis.set(xscale="log", title=method, xlabel="learning rate", ylim=(0.95 * min(best_of), 1.15 * max(best_of)))
        axis.set_xticks(rates(config, method), [f"{rate:g}" for rate in rates(config, method)])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(config.out / "loss.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    run(main, Config, __doc__)
