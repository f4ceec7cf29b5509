"""A producer and a trainer as functions, to be run in processes that are killed, delayed and counted."""

import json
import time
from collections import Counter
from pathlib import Path

from data_pipeline.shards import shard_name, write_raw

SHARDS, SAMPLES, PASSES, BATCH = 5, 6, 2, 4
MIXED = 2
"""Shards that are permuted together."""


def write_shards(folder: Path, make_raw) -> Path:
    """SHARDS raw shards of SAMPLES pictures."""
    for i in range(SHARDS):
        write_raw(folder / shard_name(i), make_raw(SAMPLES, seed=i))
    return folder


def encode(raw: Path, components: Path, out: Path, ahead: int = 3) -> None:
    """data_pipeline/produce.py, with short patience."""
    from data_pipeline import claims, shard_stage
    from data_pipeline.production import Production, produce

    claims.BEAT_S, claims.DEAD_S, shard_stage.POLL_S = 0.05, 0.4, 0.05
    produce(
        Production(data=str(raw), components=components, res=32, out=out, batch_size=4, ahead=ahead, decode_threads=1)
    )


def train(out: Path, run: Path, samples: int, late_s: float = 0.0, pause_s: float = 0.02, attempt: int = 0) -> None:
    """The trainers' loop on what is there; each rank notes the keys of a step before it is made.

    The last rank comes `late_s` later than the others. `attempt` grows where a run goes on in another layout.
    """
    import torch.distributed as dist

    from data_pipeline import live, order
    from data_pipeline.loader import Loader
    from model.config import MMDiTConfig
    from training.engine.config import EngineConfig
    from training.engine.step import Engine
    from training.flow_matching import VelocityMSE
    from training.flow_on_data import agreed_live
    from training.loop import LoopConfig
    from training.loop import train as loop
    from training.run_folder import RunFolder

    order.MIXED_SHARDS = MIXED
    if dist.is_initialized() and dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(late_s)
    while not (out / "live.json").exists() or not (out / "empty.safetensors").exists():
        time.sleep(0.01)
    steps = PASSES * samples // BATCH
    model = MMDiTConfig(1, 2, 16, joint_attention_dim=128, axes_dims_rope=(4, 6, 6))
    engine = Engine(model, EngineConfig(ema_decay=0.9), steps)
    engine.initialize(0)

    class Noted(VelocityMSE):
        def prepare(self, batch, rng, align):
            time.sleep(pause_s)  # so that misfortunes find it at work
            with (run / f"lineage-{engine.rank}.jsonl").open("a") as file:
                file.write(json.dumps([attempt, engine.step_count, [[s.key, s.epoch] for s in batch]]) + "\n")
            return super().prepare(batch, rng, align)

    run.mkdir(exist_ok=True, parents=True)
    data = live.open_dataset((out,), live=lambda folder: agreed_live(engine, folder))
    batches = Loader(data, BATCH, engine.dp_rank, engine.dp_size, max_tokens=10**6)
    loop(engine, Noted(), batches, LoopConfig(steps, save_every=2), RunFolder(run, {}, writes=engine.rank == 0))
    batches.close()
    engine.close()


def lineage(run: Path) -> list[list[tuple[str, int]]]:
    """(key, epoch) of what the last checkpoint was trained on, step by step, of all ranks, sorted."""
    steps: dict[int, dict[int, list]] = {}
    for file in run.glob("lineage-*.jsonl"):
        mine: dict[tuple[int, int], list] = {}
        for row in file.read_text().splitlines():
            try:
                attempt, step, keys = json.loads(row)
            except ValueError:
                continue  # cut by a kill: its step was not made
            mine[step, attempt] = keys
        for (step, attempt), keys in mine.items():
            steps.setdefault(step, {}).setdefault(attempt, []).extend(keys)
    last = [steps[step][max(steps[step])] for step in sorted(steps)]
    return [sorted((key, epoch) for key, epoch in step) for step in last]


def counted(run: Path) -> Counter:
    """How often each (key, epoch) was trained on."""
    return Counter(pair for step in lineage(run) for pair in step)
