"""Train the judge of the shapes world on domain-randomised pictures and write its weights, to be frozen by hash.

The weights in this folder came from the defaults. Another judge changes every score: freeze it before any reward is
maximised, and put its hash into judge.py. An interrupted run goes on when the command is run again.
"""

import math
from dataclasses import dataclass
from pathlib import Path

try:
    from command_line import UserError, progress, run
except ModuleNotFoundError:
    raise SystemExit("not installed: run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class TrainJudgeConfig:
    output: Path = Path("runs/judge/judge.safetensors")
    """Where the weights go (and, until it is done, the training state beside them)."""
    steps: int = 2000
    batch_size: int = 48
    learning_rate: float = 3e-3
    seed: int = 0
    save_every: int = 100
    dry_run: bool = False
    """Say what would be trained and stop."""


def main(config: TrainJudgeConfig) -> None:
    import torch

    from evaluation.judge import SIDE, JudgeNet
    from evaluation.judge_targets import loss_of, training_batch

    if config.steps < 1 or config.batch_size < 2 or config.save_every < 1:
        raise UserError(f"need at least 1 step of 2 pictures, got {config.steps} of {config.batch_size}")
    torch.manual_seed(config.seed)
    net = JudgeNet().to(memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in net.parameters())
    pictures = config.steps * config.batch_size
    print(f"judge of {parameters:,} parameters, {pictures:,} pictures of {SIDE} px -> {config.output}", flush=True)
    if config.dry_run:
        return
    config.output.parent.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=0.02)
    name = f"{config.steps}x{config.batch_size}-{config.learning_rate}-{config.seed}.training.safetensors"
    state_file = config.output.with_name(name)
    start = _resume(net, optimizer, state_file) if state_file.exists() else 0
    with progress(config.steps, "judge", "step", start) as bar:
        for step in range(start, config.steps):
            warmup, rest = min(1.0, (step + 1) / 50), 0.5 + 0.5 * math.cos(math.pi * step / config.steps)
            optimizer.param_groups[0]["lr"] = config.learning_rate * warmup * rest
            loss, parts = loss_of(net, *training_batch(config.seed, step, config.batch_size))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            bar.set_postfix(parts, refresh=False)
            bar.update()
            if (step + 1) % config.save_every == 0:
                _save({"next_step": torch.tensor(step + 1), **_tensors(net, optimizer)}, state_file)
    _save({k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}, config.output)
    state_file.unlink(missing_ok=True)
    print(f"wrote {config.output}")


def _tensors(net, optimizer) -> dict:
    """All that training depends on, by name (references, not copies)."""
    moments = {f"adam.{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    return {f"net.{k}": v for k, v in net.state_dict().items()} | moments


def _resume(net, optimizer, file: Path) -> int:
    from safetensors.torch import load_file

    saved = load_file(file)
    net.load_state_dict({k.removeprefix("net."): v for k, v in saved.items() if k.startswith("net.")})
    state: dict[int, dict] = {}
    for name, value in saved.items():
        if name.startswith("adam."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(saved["next_step"])


def _save(tensors: dict, file: Path) -> None:
    from safetensors.torch import save

    from files import atomic_file

    with atomic_file(file) as out:
        out.write(save({k: v.contiguous() for k, v in tensors.items()}))


if __name__ == "__main__":
    run(main, TrainJudgeConfig)
