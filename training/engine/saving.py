"""Saving and loading an engine's whole state, every rank its part (Megatron's dist_checkpointing, `torch_dist`).

The format is in `checkpoint.py`. Where adapters train, they are all that is saved of the weights. Optimizer state is
`fully_reshardable`: stored in the parameters' own shapes, it loads under any number of tensor-, context- and
data-parallel ranks. The moving average is stored likewise.

What is saved is copied to the host's memory; a thread writes it while training goes on, over a process group of its
own. One save is under way at most.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter

from files import write_json
from model.config import LoRAConfig
from model.ops import fill_weight
from training.behind import Behind
from training.ema import MovingAverage
from training.engine import checkpoint
from training.engine.device import Layout, megatron_region
from training.engine.shards import Shards

SHARDING = "fully_reshardable"
"""Megatron's name of the format of optimizer state."""
WEIGHTS = "model."
"""What the weights' names begin with."""
STATE_PARTS = ("param", "exp_avg", "exp_avg_sq")
"""Of a parameter's state, each fp32 and in its shape."""


class _Copy(TorchDistSaveShardedStrategy):
    """Copies what this rank is to write to the host's memory; Megatron's own writers are forked, which is unsafe beside
    CUDA and threads."""

    state: dict[str, Any]
    data: list[Tensor]

    def save(self, sharded_state_dict: dict, checkpoint_dir: str) -> None:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        for key, parts in state.items():
            for part in parts:
                alive = key.startswith(WEIGHTS)  # optimizer state and averages have just been gathered
                if isinstance(part, ShardedTensor):
                    part.data = part.data.detach().to("cpu", copy=alive)
        self.data = [part.data for parts in state.values() for part in parts if isinstance(part, ShardedTensor)]
        self.state = mcore_to_pyt_state_dict(state, False)

    def free(self) -> None:
        """Give the copies' memory back; torch's planner is in a circle of references that holds them."""
        for data in self.data:
            data.untyped_storage().resize_(0)


@dataclass
class Saving:
    """The parts of an engine that are saved. Every method is collective."""

    model_config: Any
    model: nn.Module
    optimizer: DistributedOptimizer
    shards: Shards
    averages: dict[str, MovingAverage]
    layout: Layout
    lora: LoRAConfig | None = None
    _writer: Behind = field(default_factory=lambda: Behind("checkpoint"))

    @torch.no_grad()
    def save(self, folder: Path, info: dict[str, Any], published: Callable[[], None] = lambda: None) -> None:
        """Begin to write checkpoint `folder` of this moment, once the one before it is written.

        `info` is JSON that `load` gives back; rank 0 calls `published` when the folder is there. All ranks share the
        file system. Raises what `wait` does.
        """
        self.wait()
        temporary, layout = folder.with_name(f".tmp-{folder.name}"), self.layout
        if layout.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        copy = strategy = _Copy("torch_dist", 1)
        if layout.dp_cp_group.size() > 1:
            strategy = FullyParallelSaveStrategyWrapper(strategy, layout.dp_cp_group)
        with megatron_region():
            averages = {
                _prefix(name): self._gathered(average.average, f"{_prefix(name)}.")
                for name, average in self.averages.items()
            }
            state = {**self._weights(), **self._optimizer(), **averages}
            dist_checkpointing.save(state, str(temporary), sharded_strategy=strategy)
        updates = {name: average.updates for name, average in self.averages.items()}
        info = {"model": checkpoint.plain(self.model_config), "updates": updates, **info}
        if self.lora is not None:
            info["lora"] = checkpoint.plain(self.lora)
        self._writer.start(lambda: self._write(copy, temporary, folder, info, published))

    def wait(self) -> None:
        """Return when the save that was begun is finished. OSError, on all ranks, if it could not be written."""
        try:
            self._writer.wait()
        except CheckpointException as error:  # torch's, with a traceback in many lines
            said = [f"rank {rank}: {found[0]}" for rank, found in error.failures.items()]
            raise OSError(f"a checkpoint could not be written: {'; '.join(said)}") from error
        except RuntimeError as error:
            raise OSError(f"a checkpoint could not be written: {error}") from error

    @property
    def failed(self) -> bool:
        """Whether the save that was begun has failed, as far as this rank knows yet."""
        return self._writer.failed

    def _write(self, copy: _Copy, temporary: Path, folder: Path, info: dict, published: Callable[[], None]) -> None:
        """Write copies to the disk and give the folder its name: the thread's work, all ranks' together."""
        rank, group = self.layout.rank, self.layout.writers_group
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        try:
            # To copy ahead it would wait on a stream of this thread's device: the first GPU, whichever is this rank's.
            writer = FileSystemWriter(temporary, per_thread_copy_ahead=0)
            torch_checkpoint.save(copy.state, storage_writer=writer, planner=planner, process_group=group)
        finally:
            copy.free()
        parts = _together(lambda: checkpoint.describe_files(sorted(temporary.glob(f"__{rank}_*"))), group)

        def publish() -> None:
            write_json(temporary / checkpoint.STATE, info)
            shared = sorted(p for p in temporary.iterdir() if not p.name.startswith("__"))
            entries = [*parts, checkpoint.describe_files(shared)]
            write_json(
                temporary / checkpoint.MANIFEST, {name: entry for part in entries for name, entry in part.items()}
            )
            checkpoint.publish(temporary, folder)
            published()

        _together(publish if rank == 0 else lambda: None, group)

    @torch.no_grad()
    def load(self, folder: Path) -> dict[str, Any]:
        """Restore everything from checkpoint `folder`, whatever layout saved it; returns its state.json.

        Raises ValueError if the checkpoint is of another model or lacks a frozen policy.
        """
        checkpoint.require_same_model(folder, self.model_config, self.lora)
        info = checkpoint.read_state(folder)
        if missing := sorted(set(self.averages) - set(info["updates"])):
            raise ValueError(f"checkpoint {folder} holds no copy of the frozen policy {', '.join(missing)}")
        with megatron_region():
            averages = {_prefix(name): self._room(name) for name in self.averages}
            state = dist_checkpointing.load({**self._weights(), **self._optimizer_room(), **averages}, str(folder))
            self._fill(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        for name, average in self.averages.items():
            for weight, whole in state[_prefix(name)].items():
                start, end = self.shards.range_of(weight)
                average.average[weight].copy_(whole.flatten()[start:end])
            average.updates = info["updates"][name]
        return info

    @torch.no_grad()
    def load_weights(self, source: Path, ema: bool) -> Path:
        """Fill the weights from the (averaged) weights of a run or checkpoint of the same model; returns which one.

        One of adapters fills adapters, one of weights all but those. Raises ValueError if it has no intact checkpoint
        or is of another model.
        """
        found = _shared_view(checkpoint.candidates(source))
        folder = self._first_intact(found)
        if folder is None:
            raise ValueError(checkpoint.no_checkpoint(source, found))
        of_adapters = checkpoint.read_state(folder).get("lora") is not None
        checkpoint.require_same_model(folder, self.model_config, self.lora if of_adapters else None)
        for name, full in checkpoint.each_tensor(folder, ema):  # a few at a time: no memory holds the model twice
            fill_weight(self.model, name, full)
        return folder

    def resume(self, checkpoints: Path) -> dict[str, Any] | None:
        """Load the newest intact checkpoint and return its state.json; None if there is no checkpoint at all.

        A damaged one is passed over with one line. Raises ValueError if all are damaged.
        """
        found = _shared_view(checkpoint.list_checkpoints(checkpoints))
        if not found:
            return None
        folder = self._first_intact(found)
        if folder is None:
            raise ValueError(f"{checkpoint.no_checkpoint(checkpoints, found)}; remove them to start over")
        return self.load(folder)

    def _first_intact(self, folders: list[Path]) -> Path | None:
        """The first folder without damage; all ranks share the checking and one says what is damaged."""
        for folder in folders:
            problems: list[str | None] = [None] * self.layout.world_size
            dist.all_gather_object(problems, checkpoint.damage(folder, self.layout.rank, self.layout.world_size))
            problem = next((p for p in problems if p), None)
            if problem is None:
                return folder
            if self.layout.rank == 0:
                print(checkpoint.passed_over(folder, problem), flush=True)
        return None

    def _fill(self, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.model.get_parameter(name).copy_(weight)

    def _sharded(self, key: str, param: Tensor, data: Tensor, replica: int | None = None) -> ShardedTensor:
        """How `data`, in the shape of this rank's `param`, lies in the whole; of replicas the first is written."""
        layout = self.layout
        replica = layout.dp_cp_group.rank() if replica is None else replica
        if hasattr(param, "tp_shard"):
            return ShardedTensor.from_rank_offsets(key, data, param.tp_shard, replica_id=(0, 0, replica))
        return ShardedTensor.from_rank_offsets(key, data, replica_id=(0, layout.tp_rank, replica))

    def _weights(self) -> dict[str, Any]:
        saved = {n: p for n, p in self.model.named_parameters() if self.lora is None or p.requires_grad}
        return {"model": {n: self._sharded(f"{WEIGHTS}{n}", p, p) for n, p in saved.items()}}

    def _optimizer(self) -> dict[str, Any]:
        """Optimizer state in Megatron's format, every tensor kept by one rank of those that share it.

        Megatron's own gathers it in buffers as large as all of it, which takes several times as long.
        """
        self._require_state()
        masters, state, numbers = self.shards.masters(), self.optimizer.optimizer.state, self._numbers()
        found: dict[int, dict[str, ShardedTensor]] = {}
        for part in STATE_PARTS:
            slices = masters if part == "param" else {name: state[own][part] for name, own in masters.items()}
            for name, tensor in self._gathered(slices, f"optimizer.state.{part}.{WEIGHTS}").items():
                found.setdefault(numbers[name], {})[part] = tensor
        return {
            "optimizer": self.optimizer.state_dict() | {"param_state": found, "param_state_sharding_type": SHARDING}
        }

    def _optimizer_room(self) -> dict[str, Any]:
        """Room for the state of every parameter of which this rank holds a slice, as `_optimizer` stores it.

        Megatron's own has room for all parameters on every rank: 12 bytes each, in host memory.
        """
        self._require_state()
        mine, numbers = self.shards.masters(), self._numbers()
        state = {
            numbers[name]: {
                part: self._own_room(f"optimizer.state.{part}.{WEIGHTS}{name}", name) for part in STATE_PARTS
            }
            for name in mine
        }
        return {
            "optimizer": self.optimizer.state_dict() | {"param_state": state, "param_state_sharding_type": SHARDING}
        }

    def _numbers(self) -> dict[str, int]:
        """Megatron's number of each trainable parameter: its place in the optimizer's buffers."""
        names = {param: name for name, param in self.model.named_parameters()}
        order = [names[param] for buffer in self.optimizer.buffers for param in buffer.param_index_map]
        return {name: i for i, name in enumerate(order)}

    def _require_state(self) -> None:
        """Make the slices' state if there is none yet, before the first update."""
        if not self.optimizer.optimizer.state:
            self.optimizer.load_state_dict(self.optimizer.state_dict())  # which leaves the moments as memory was
            for state in self.optimizer.optimizer.state.values():
                for part in STATE_PARTS[1:]:
                    state[part].zero_()

    def _gathered(self, slices: dict[str, Tensor], prefix: str) -> dict[str, ShardedTensor]:
        """Whole tensors of all ranks' slices, each kept by one rank of those that share it: copies in host memory."""
        group, kept = self.layout.dp_cp_group, {}
        for i, (name, whole) in enumerate(self.shards.gather(slices)):
            if i % group.size() == group.rank():
                param = self.model.get_parameter(name)
                kept[name] = self._sharded(f"{prefix}{name}", param, whole.to("cpu", copy=True), replica=0)
        return kept

    def _room(self, average: str) -> dict[str, ShardedTensor]:
        """Room for every average of which this rank holds a slice."""
        prefix = _prefix(average)
        return {name: self._own_room(f"{prefix}.{name}", name) for name in self.averages[average].average}

    def _own_room(self, key: str, name: str) -> ShardedTensor:
        """Room for a whole fp32 tensor like a parameter of which this rank holds a slice."""
        param, (start, _) = self.model.get_parameter(name), self.shards.range_of(name)
        replica = 0 if start == 0 else 1 + self.layout.dp_cp_group.rank()
        return self._sharded(key, param, torch.empty(param.shape, dtype=torch.float32), replica)


def _prefix(average: str) -> str:
    """What an average's tensors are called in a checkpoint."""
    return average if average == "ema" else f"frozen.{average}"


def _together(work: Callable[[], Any], group: dist.ProcessGroup) -> list[Any]:
    """What `work` gives on each rank; where it fails on one, all raise RuntimeError."""
    result, problem = None, None
    try:
        result = work()
    except Exception as error:  # noqa: BLE001 - raised again, on all ranks
        problem = error
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (result, None if problem is None else str(problem)), group=group)
    said = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(found) if text is not None]
    if said:
        raise RuntimeError("; ".join(said)) from problem
    return [result for result, _ in found]


def _shared_view(folders: list[Path]) -> list[Path]:
    """What rank 0 sees on the disk."""
    found: list[Any] = [folders]
    dist.broadcast_object_list(found)
    return found[0]
