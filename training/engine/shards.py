"""Megatron's distributed optimizer keeps flat slices of weights; this turns them into tensors by name and back.

Parameters lie one behind another in buckets. Of each bucket, data-parallel rank r (context parallel included) updates
the r-th of equal slices, whose borders do not respect the parameters'.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


@dataclass(frozen=True)
class Shards:
    """Names and slices of the trainable parameters of `ddp`, of which `optimizer` updates this rank's part."""

    ddp: DistributedDataParallel
    optimizer: DistributedOptimizer

    def masters(self) -> dict[str, Tensor]:
        """This rank's slice of the fp32 master of each parameter of which it has one."""
        groups, where = self.optimizer.optimizer.param_groups, self.optimizer.model_param_group_index_map
        at = {name: where[param] for name, param in self._trainable().items() if param in where}
        return {name: groups[group]["params"][index] for name, (group, index) in at.items()}

    def range_of(self, name: str) -> tuple[int, int]:
        """First and last + 1 element, in the flattened parameter, of this rank's slice."""
        span = self.optimizer._get_model_param_range_map(self.ddp.module.get_parameter(name))["param"]
        return span.start, span.end

    def spans(self) -> dict[str, list[tuple[int, int]]]:
        """`range_of` every parameter on each of the ranks that share its updates; empty where one has no part of it."""
        names, found = {param: name for name, param in self._trainable().items()}, {}
        for buffer in self.ddp.buffers:
            for bucket in buffer.buckets:
                part = bucket.grad_data.numel() // self.ddp.intra_dp_cp_group.size()
                for param in bucket.params_list:
                    start = buffer.param_index_map[param][0] - bucket.offset
                    borders = (r * part - start for r in range(self.ddp.intra_dp_cp_group.size() + 1))
                    found[names[param]] = list(pairwise(min(max(at, 0), param.numel()) for at in borders))
        return found

    def gather(self, slices: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors in the shape of this rank's parameters from all ranks' slices, one bucket at a time.

        Slices travel as `dtype`.
        """
        names = {param: name for name, param in self._trainable().items()}
        group = self.ddp.intra_dp_cp_group
        if group.size() == 1:
            shapes = {name: self.ddp.module.get_parameter(name).shape for name in slices}
            yield from ((name, part.to(dtype).view(shapes[name])) for name, part in slices.items())
            return
        for buffer in self.ddp.buffers:
            for bucket in buffer.buckets:
                whole = torch.zeros_like(bucket.grad_data, dtype=dtype)
                mine = whole.chunk(group.size())[group.rank()]
                for param in bucket.params_list:
                    if names[param] in slices:
                        span = self.optimizer._get_model_param_range_map(param)["gbuf_local"]
                        mine[span.start : span.end] = slices[names[param]]
                dist.all_gather_into_tensor(whole, mine.clone(), group=group)
                for param in bucket.params_list:
                    start, end, _ = buffer.param_index_map[param]
                    yield names[param], whole[start - bucket.offset : end - bucket.offset].view(param.shape)

    def _trainable(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.ddp.module.named_parameters() if p.requires_grad}
