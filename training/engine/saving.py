"""Saving and loading an engine's whole state, every rank its part (Megatron's dist_checkpointing, `torch_dist`).

The format is in `checkpoint.py`. Optimizer state is `fully_reshardable`: stored in the parameters' own shapes, it
loads under any number of tensor-, context- and data-parallel ranks. The moving average is stored likewise.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter

from training.engine import checkpoint
from training.engine.device import megatron_region

if TYPE_CHECKING:
    from training.engine.step import Engine

LEAN_PARAMETERS = 10**9
"""From so many parameters a rank, one rank of each data-parallel group gathers optimizer state instead of all."""


class _InProcessSave(TorchDistSaveShardedStrategy):
    """Writes from this process; Megatron's own forks writers and spawns a manager, unsafe beside CUDA and threads."""

    def save(self, sharded_state_dict: dict, checkpoint_dir: str) -> None:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save(engine: "Engine", folder: Path, extra: dict[str, Any]) -> None:
    """Write checkpoint `folder`; `extra` is JSON that `load` gives back. All ranks share the file system."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    if engine.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    group = engine.layout.dp_cp_group
    strategy = _InProcessSave("torch_dist", 1)
    if group.size() > 1:
        strategy = FullyParallelSaveStrategyWrapper(strategy, group)
    with megatron_region():
        state = {**_weights(engine), **_optimizer(engine, loading=False), "ema": _averages(engine)}
        dist_checkpointing.save(state, str(temporary), sharded_strategy=strategy)

    mine = sorted(p.name for p in temporary.glob(f"__{engine.rank}_*"))
    parts: list[Any] = [None] * engine.world_size
    dist.all_gather_object(parts, checkpoint.describe_files(temporary, mine))
    if engine.rank == 0:
        state = {
            "step": engine.step_count,
            "skipped": engine.skipped,
            "ema_updates": engine.ema.updates,
            "model": checkpoint.plain(engine.model_config),
            "extra": extra,
        }
        checkpoint.write_json(temporary / checkpoint.STATE, state)
        shared = sorted(p.name for p in temporary.iterdir() if not p.name.startswith("__"))
        parts.append(checkpoint.describe_files(temporary, shared))
        manifest = {name: entry for part in parts for name, entry in part.items()}
        checkpoint.write_json(temporary / checkpoint.MANIFEST, manifest)
        checkpoint.publish(temporary, folder)
    dist.barrier()


@torch.no_grad()
def load(engine: "Engine", folder: Path) -> dict[str, Any]:
    """Restore everything from checkpoint `folder` into an engine of any layout; returns `extra`.

    Raises ValueError if the checkpoint is of another model.
    """
    checkpoint.require_same_model(folder, engine.model_config)
    with megatron_region():
        state = {**_weights(engine), **_optimizer(engine, loading=True), "ema": _averages_to_load(engine)}
        state = dist_checkpointing.load(state, str(folder))
        _fill(engine, state["model"])
        engine.optimizer.load_state_dict(state["optimizer"])
    for name, whole in state["ema"].items():
        start, end = engine.shards.range_of(name)
        engine.ema.average[name].copy_(whole.flatten()[start:end])
    info = checkpoint.read_state(folder)
    engine.step_count, engine.skipped, engine.ema.updates = info["step"], info["skipped"], info["ema_updates"]
    return info["extra"]


@torch.no_grad()
def load_weights_only(engine: "Engine", source: Path, ema: bool) -> None:
    """Fill the weights from the (averaged) weights of a run or checkpoint of the same model.

    Raises ValueError if it has no intact checkpoint or is of another model.
    """
    found = _shared_view(checkpoint.candidates(source))
    folder = _first_intact(engine, found)
    if folder is None:
        raise ValueError(checkpoint.no_checkpoint(source, found))
    checkpoint.require_same_model(folder, engine.model_config)
    with megatron_region():
        state = _weights(engine)
        for name, param in engine.model.named_parameters():
            if ema and param.requires_grad:
                room = torch.empty_like(param, dtype=torch.float32)
                state["model"][name] = _sharded(engine, f"ema.{name}", param, room)
        _fill(engine, dist_checkpointing.load(state, str(folder))["model"])


def resume(engine: "Engine", checkpoints: Path) -> dict[str, Any] | None:
    """Load the newest intact checkpoint and return its `extra`; None if there is no checkpoint at all.

    A damaged one is passed over with one line. Raises ValueError if all are damaged.
    """
    found = _shared_view(checkpoint.list_checkpoints(checkpoints))
    if not found:
        return None
    folder = _first_intact(engine, found)
    if folder is None:
        raise ValueError(f"{checkpoint.no_checkpoint(checkpoints, found)}; remove them to start over")
    return load(engine, folder)


def _shared_view(folders: list[Path]) -> list[Path]:
    """What rank 0 sees on the disk."""
    found: list[Any] = [folders]
    dist.broadcast_object_list(found)
    return found[0]


def _first_intact(engine: "Engine", folders: list[Path]) -> Path | None:
    """The first folder without damage; all ranks share the checking and one says what is damaged."""
    for folder in folders:
        problems: list[str | None] = [None] * engine.world_size
        dist.all_gather_object(problems, checkpoint.damage(folder, engine.rank, engine.world_size))
        problem = next((p for p in problems if p), None)
        if problem is None:
            return folder
        if engine.rank == 0:
            print(checkpoint.passed_over(folder, problem), flush=True)
    return None


def _fill(engine: "Engine", weights: dict[str, Tensor]) -> None:
    for name, param in engine.model.named_parameters():
        param.copy_(weights[name])


def _sharded(engine: "Engine", key: str, param: Tensor, data: Tensor, replica: int | None = None) -> ShardedTensor:
    """How `data`, in the shape of this rank's `param`, lies in the whole; of equal replicas the first is written."""
    layout = engine.layout
    replica = layout.dp_cp_group.rank() if replica is None else replica
    if hasattr(param, "tp_shard"):
        return ShardedTensor.from_rank_offsets(key, data, param.tp_shard, replica_id=(0, 0, replica))
    return ShardedTensor.from_rank_offsets(key, data, replica_id=(0, layout.tp_rank, replica))


def _weights(engine: "Engine") -> dict[str, Any]:
    return {"model": {n: _sharded(engine, f"model.{n}", p, p) for n, p in engine.model.named_parameters()}}


def _optimizer(engine: "Engine", loading: bool) -> dict[str, Any]:
    trainable = sum(p.numel() for p in engine.model.parameters() if p.requires_grad)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": trainable >= LEAN_PARAMETERS,
    }
    state = engine.optimizer.sharded_state_dict(_weights(engine), is_loading=loading, metadata=metadata)
    if state["param_state"] is None:  # gathered on another rank
        state["param_state"] = {}
    return {"optimizer": state}


def _averages(engine: "Engine") -> dict[str, ShardedTensor]:
    """Whole averages, each kept by one rank of those that share it, in host memory."""
    group = engine.layout.dp_cp_group
    averages = {}
    for i, (name, whole) in enumerate(engine.shards.gather(engine.ema.average)):
        if i % group.size() == group.rank():
            param = engine.model.get_parameter(name)
            averages[name] = _sharded(engine, f"ema.{name}", param, whole.cpu().clone(), replica=0)
    return averages


def _averages_to_load(engine: "Engine") -> dict[str, ShardedTensor]:
    """Room for every average of which this rank holds a slice."""
    averages = {}
    for name in engine.ema.average:
        param, (start, _) = engine.model.get_parameter(name), engine.shards.range_of(name)
        room = torch.empty(param.shape, dtype=torch.float32)
        replica = 0 if start == 0 else 1 + engine.layout.dp_cp_group.rank()
        averages[name] = _sharded(engine, f"ema.{name}", param, room, replica)
    return averages
