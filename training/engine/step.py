"""Engine: one training step of any algorithm on Megatron's DDP and distributed optimizer.

The gradient of a step is sum(loss sums) / sum(weights) over all microbatches and data-parallel ranks. Tensor- and
context-parallel peers are given the same microbatches and compute the same loss.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from model.config import MMDiTConfig
from model.lora import Adapters, add_adapters, initialize_adapters, load_adapters
from model.mmdit import MMDiT
from model.moving import moved, pinned
from model.ops import Ops, fill_weight
from training.ahead import one_ahead
from training.algorithm import Algorithm, Prepared
from training.cost.step import policy_work
from training.cost.weights import Weights
from training.ema import ramped
from training.engine import adam, checkpoint, clipping, device, muon
from training.engine.blocks import prepare_blocks
from training.engine.config import EngineConfig
from training.engine.frozen import FrozenPolicies
from training.engine.groups import RATE, parameter_groups
from training.engine.health import GROUPS, Health
from training.engine.ops import MegatronOps
from training.engine.quantized import QuantizedOps
from training.engine.saving import Saving
from training.engine.shards import Shards
from training.engine.swap import Swap
from training.kinds import kinds_of
from training.randomness import Randomness

COMPILED_QUANTUM = 256
"""Tokens that packs are rounded up to for compiled blocks, so that few shapes occur."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Engine:
    """A model with everything that trains it, spread over the processes of this run.

    `build(model_config, ops)` makes the model: by default an MMDiT; any module of plain layers will do without tensor
    and context parallelism. `total_steps` is the run's length, for the learning-rate schedule. Fill the weights with
    `initialize`, `load_weights`, `load_run` or `load` before the first step. Every method is collective: all ranks call
    it with the same arguments, microbatches apart.
    """

    def __init__(
        self,
        model_config: Any,
        config: EngineConfig,
        total_steps: int = 1,
        build: Callable[[Any, Ops], nn.Module] = MMDiT,
    ):
        self.model_config, self.config, self.total_steps = model_config, config, total_steps
        self.layout = layout = device.start(config.parallel)
        self.device, self.rank, self.world_size = layout.device, layout.rank, layout.world_size
        self.dp_rank, self.dp_size = layout.dp_rank, layout.dp_size
        dtype = config.dtype if config.dtype != "auto" else "bfloat16" if layout.device.type == "cuda" else "float32"
        self.dtype = DTYPES[dtype]
        self.runs_ahead = layout.device.type == "cuda"
        """Whether a thread prepares microbatches beforehand: where it does not take cores from the model."""
        self.ops = self._ops()
        self.align = self.ops.align
        with device.megatron_region():
            self.model = build(model_config, self.ops)
            if config.swap_blocks:
                Swap(getattr(self.model, "blocks", ()), config.swap_blocks, self.device)
            self.model.to(self.device, self.dtype)
            if config.lora is not None:
                add_adapters(self.model, config.lora)
            prepare_blocks(self.model, config.compiles(self.device.type), config.recompute)
            self._ddp, self.optimizer = self._wrap()
        self.shards = Shards(self._ddp, self.optimizer)
        if config.optimizer.muon_lr is not None:
            self.optimizer.optimizer.muon = muon.Muon(self.shards, layout, self.dtype)
        decay, on_host = ramped(config.ema_decay), config.average_on_host
        self.frozen = FrozenPolicies(self.model, self.shards, self.dtype, decay, on_host)
        self._saving = Saving(
            model_config, self.model, self.optimizer, self.shards, self.frozen.averages, layout, config.lora
        )
        self.health = Health(layout, self.optimizer, self.shards)
        known = isinstance(model_config, MMDiTConfig)
        self._weights = Weights(model_config, config.lora, config.quantize, config.swap_blocks) if known else None
        self.step_count = self.skipped = 0

    # Weights

    def initialize(self, seed: int) -> None:
        """Fill the weights at random, alike in every layout (see `MMDiT.initialize`); adapters, too."""
        self.model.initialize(seed)
        self.initialize_adapters(seed)

    def initialize_adapters(self, seed: int) -> None:
        """Start adapters over: they change nothing yet, and what they will learn from is random."""
        initialize_adapters(self.model, seed)
        self.weights_changed()

    def load_adapters(self, adapters: Adapters) -> None:
        """Fill the adapters from whole ones; ValueError names one that does not match."""
        load_adapters(self.model, adapters)
        self.weights_changed()

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fill all weights but adapters from (name, whole tensor) pairs; ValueError names what is missing or odd."""
        params, seen = {name for name, _ in self.model.named_parameters() if ".lora." not in name}, set()
        for name, full in weights:
            if name not in params:
                raise ValueError(f"the model has no weight called {name}")
            fill_weight(self.model, name, full)
            seen.add(name)
        if missing := sorted(params - seen):
            raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")
        self.weights_changed()

    def weights_changed(self) -> None:
        """Say that weights were set from outside: masters follow, averages start over."""
        self.optimizer.reload_model_params()
        self.frozen.start_over()

    # Steps

    def prepare(self, algorithm: Algorithm, batch: list[Any], rng: Randomness) -> Prepared:
        """A microbatch as `step` takes it; touches no model, so that another thread may do it beforehand."""
        inputs, aux = algorithm.prepare(batch, rng, self.align)
        ready = Prepared(inputs, aux, tuple(getattr(item, "key", "") for item in batch), kinds_of(batch, inputs))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # each thread has a device of its own
            ready = pinned(ready)
        return ready

    def step(
        self, algorithm: Algorithm, microbatches: Sequence[list[Any] | Prepared], rng: Randomness
    ) -> dict[str, float]:
        """One update from this data-parallel rank's microbatches; returns metrics, equal on all ranks.

        Metrics: the algorithm's (averages over the weight), `grad_norm` (before clipping), `lr`, `samples` (weight of
        the step), `tokens`, `flops` (of the policy's forward and backward pass), `skipped` (steps so far whose loss or
        gradient was not finite: such a step changes no weight), and those of `health`.
        """
        totals = self.backward(algorithm, microbatches, rng)
        return self.update(totals)

    def backward(
        self, algorithm: Algorithm, microbatches: Sequence[list[Any] | Prepared], rng: Randomness
    ) -> dict[str, Tensor]:
        """Sum the gradient over microbatches and ranks, unscaled; returns the summed `_weight`, `_loss` and metrics,
        fp64 scalars on the device."""
        if not microbatches:
            raise ValueError("every rank needs at least one microbatch a step")
        self._ddp.zero_grad_buffer()
        self.frozen.first_microbatch()
        self.health.begin()
        totals: dict[str, Tensor] = {}
        for i, ready in enumerate(self._prepared(algorithm, microbatches, rng)):
            inputs, aux, kinds = moved((ready.inputs, ready.aux, ready.kinds), self.device)
            with nullcontext() if i == len(microbatches) - 1 else self._ddp.no_sync():
                loss, weight, metrics = algorithm.loss(self._ddp, self.frozen, inputs, aux)
                loss.backward()
            tokens, flops = policy_work(self._weights, inputs)
            counted = {"_loss": loss.detach(), "_weight": weight, "_tokens": tokens, "_flops": flops}
            for name, value in {**metrics, **counted}.items():
                totals[name] = totals.get(name, 0) + self._scalar(value)
            losses = metrics.get("loss")
            if kinds is not None and losses is not None and losses.shape == kinds.member.shape[1:]:
                self.health.add(kinds, losses)
        with device.megatron_region():
            self._ddp.finish_grad_sync()
            self._sum_partial_gradients()
        names = sorted(totals)
        values = torch.cat([torch.stack([totals[n] for n in names]), self.health.losses()])
        dist.all_reduce(values, group=self.layout.dp_group)
        self.health.reduced(values[len(names) :])
        return dict(zip(names, values[: len(names)].unbind(), strict=True))

    def _prepared(
        self, algorithm: Algorithm, microbatches: Sequence[list[Any] | Prepared], rng: Randomness
    ) -> Iterator[Prepared]:
        prepare = lambda batch: batch if isinstance(batch, Prepared) else self.prepare(algorithm, batch, rng)  # noqa: E731
        return one_ahead(prepare, microbatches) if self.runs_ahead else map(prepare, microbatches)

    def _scalar(self, value: Tensor | float) -> Tensor:
        """fp64 on the device; a number goes there as an argument of a kernel, for which nobody waits."""
        if isinstance(value, Tensor):
            return moved(value.sum().double(), self.device)
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def update(self, totals: dict[str, Tensor]) -> dict[str, float]:
        """Scale, clip and apply the gradient of `backward`; see `step` for what it returns.

        The device is read once, before the update is queued: while it works at the update, the host logs the step and
        queues the next.
        """
        optimizer, settings = self.optimizer, self.config.optimizer
        lr = settings.learning_rate(self.step_count, self.total_steps)
        of_muon = dataclasses.replace(settings, lr=settings.muon_lr or 0.0)
        muon_lr = of_muon.learning_rate(self.step_count, self.total_steps)
        for group in optimizer.param_groups:
            rate = muon_lr if group[muon.MARK] else lr * group[RATE]
            decay = settings.weight_decay * group["wd_mult"] / group[RATE]  # as much a step at any width
            group.update(lr=rate, weight_decay=decay, betas=settings.betas, eps=settings.eps)
        with device.megatron_region():
            self._ddp.scale_gradients((1 / totals["_weight"]).float())
            optimizer.prepare_grads()
            norms = clipping.squared_norms(optimizer, totals["_loss"], self.health.member())
            values = torch.cat([torch.stack([*totals.values()]), norms.double(), self.health.values()]).tolist()
            sums, (squared, not_finite, *rest) = values[: len(totals)], values[len(totals) :]
            totals, grad_norm = dict(zip(totals, sums, strict=True)), squared**0.5
            health = self.health.read(rest[len(GROUPS) :], rest[: len(GROUPS)])
            if not_finite or not math.isfinite(grad_norm):
                self.skipped += 1
            else:
                clipping.clip(optimizer, settings.clip, grad_norm)
                before = self.health.before_update(self.step_count)
                optimizer.step_with_ready_grads()
                self.health.after_update(before)
                self.frozen.policy_changed()
        self.step_count += 1
        weight = totals["_weight"]
        means = {n: value / weight if weight else math.nan for n, value in totals.items() if not n.startswith("_")}
        counts = {"samples": weight, "tokens": totals["_tokens"], "flops": totals["_flops"]}
        return {**means, "grad_norm": grad_norm, "lr": lr, **counts, "skipped": float(self.skipped), **health}

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; the device is not asked."""
        if self.world_size == 1:
            return flag
        value = torch.tensor(float(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.layout.host_group)
        return bool(value.item())

    def _sum_partial_gradients(self) -> None:
        """Sum over tensor-parallel ranks what each of them computed from its own heads or tokens."""
        if self.layout.tp_size == 1:
            return
        grads = [
            p.main_grad for p in self.model.parameters() if p.requires_grad and getattr(p, "tp_partial_grad", False)
        ]
        if grads:
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat, group=self.layout.tp_group)
            for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(total.view_as(grad))

    # Checkpoints

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """Write a checkpoint folder; `extra` is JSON that `load` gives back."""
        self._begin_save(Path(folder), extra)
        self.wait_for_save()

    def save_step(self, checkpoints: Path, extra: dict[str, Any], keep: int) -> None:
        """Write the checkpoint of this step below `checkpoints` and delete those older than the newest `keep`."""
        self.begin_save_step(checkpoints, extra, lambda: checkpoint.prune(Path(checkpoints), keep))
        self.wait_for_save()

    def begin_save_step(self, checkpoints: Path, extra: dict[str, Any], published: Callable[[], None]) -> None:
        """Copy what the checkpoint of this step holds, and let a thread write it below `checkpoints`.

        A save that was begun before is waited for. When the checkpoint is there, rank 0's thread calls `published`.
        """
        self._begin_save(checkpoint.step_folder(Path(checkpoints), self.step_count), extra, published)

    def _begin_save(self, folder: Path, extra: dict[str, Any], published: Callable[[], None] = lambda: None) -> None:
        counters = {"step": self.step_count, "skipped": self.skipped, "health": self.health.state()}
        self._saving.save(folder, {**counters, "extra": extra}, published)

    def wait_for_save(self) -> None:
        """Return when the save that was begun is on the disk. OSError, on all ranks, if it could not be written."""
        self._saving.wait()

    @property
    def save_failed(self) -> bool:
        """Whether the save that was begun has failed, as far as this rank knows yet; `wait_for_save` says why."""
        return self._saving.failed

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore weights, optimizer, averages and counters, whatever layout saved them; returns `extra`."""
        return self._restored(self._saving.load(Path(folder)))

    def resume(self, checkpoints: Path) -> dict[str, Any] | None:
        """Load the newest intact checkpoint below `checkpoints` and return its `extra`, or None if there is none."""
        state = self._saving.resume(Path(checkpoints))
        return None if state is None else self._restored(state)

    def load_run(self, source: Path, ema: bool = True) -> Path:
        """Start from the (averaged) weights, or adapters, of another run's or checkpoint's folder; returns the
        checkpoint taken."""
        folder = self._saving.load_weights(Path(source), ema)
        self.weights_changed()
        return folder

    def _restored(self, state: dict[str, Any]) -> dict[str, Any]:
        self.step_count, self.skipped = state["step"], state["skipped"]
        if "health" in state:
            self.health.load_state(state["health"])
        self.frozen.release()
        return state["extra"]

    def close(self) -> None:
        """Take down the process groups."""
        device.stop()

    def _ops(self) -> MegatronOps:
        config = self.config
        quantum = COMPILED_QUANTUM if config.compiles(self.device.type) else 16
        common = (self.layout, self.dtype, config.attention, quantum)
        selective = config.recompute == "selective"
        if config.quantize == "none":
            return MegatronOps(*common, seen_by_aten=selective)
        storage = torch.device("cpu") if config.swap_blocks else self.device
        return QuantizedOps(config.quantize, *common, storage=storage, seen_by_aten=selective)

    def _wrap(self) -> tuple[DistributedDataParallel, DistributedOptimizer]:
        settings, bf16 = self.config.optimizer, self.dtype == torch.bfloat16
        adam.install(always=settings.muon_lr is not None)
        sharding = dict(use_distributed_optimizer=True)
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=self.layout.dp_cp_group.size() > 1, **sharding
        )
        ddp = DistributedDataParallel(self.ops.config, ddp_config, self.model)
        if self.layout.dp_cp_group.size() == 1:
            for group in ddp.bucket_groups:  # Megatron would copy all weights and gradients onto themselves
                group.start_param_sync = group.start_grad_sync = lambda *args, **kwargs: None
        optimizer_config = MegatronOptimizerConfig(
            optimizer="adam", lr=settings.lr, weight_decay=settings.weight_decay, clip_grad=settings.clip,
            adam_beta1=settings.betas[0], adam_beta2=settings.betas[1], adam_eps=settings.eps,
            bf16=bf16, params_dtype=self.dtype, **sharding,
        )  # fmt: skip
        groups = parameter_groups(optimizer_config, settings, getattr(self.model_config, "width", None))
        return ddp, get_megatron_optimizer(optimizer_config, [ddp], groups).chained_optimizers[0]
