# SPDX-License-Identifier: Apache-2.0
"""Watched workers of data-parallel engines on CPUs (`--worker-extension-cls`).

vLLM's CPU communicator chooses an all-to-all for experts that calls `all_gatherv` and
`reduce_scatterv`, and has neither: such an engine ends with NotImplementedError as it
starts. Here gloo does both, for tests of what the experts make of them.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

from tests.engine_worker import Watched

__all__ = ["Watched"]


def _all_gatherv(
    self: CpuCommunicator,
    input_: list[Tensor],
    dim: int = 0,
    sizes: list[int] | None = None,
) -> list[Tensor]:
    """Of each tensor [sizes[rank], ...] those of all ranks, in order."""
    assert dim == 0 and sizes is not None
    return [_gathered(self, one, sizes) for one in input_]


def _gathered(communicator: CpuCommunicator, own: Tensor, sizes: list[int]) -> Tensor:
    # Each rank's in turn: gloo gathers tensors of one size alone.
    parts = [own.new_empty(size, *own.shape[1:]) for size in sizes]
    parts[communicator.rank_in_group] = own.contiguous()
    for rank, part in zip(communicator.ranks, parts, strict=True):
        dist.broadcast(part, rank, group=communicator.device_group)
    return torch.cat(parts)


def _reduce_scatterv(
    self: CpuCommunicator, input_: Tensor, dim: int = 0, sizes: list[int] | None = None
) -> Tensor:
    """Of the sum over ranks of [sum of sizes, ...] this rank's [sizes[rank], ...]."""
    assert dim == 0 and sizes is not None
    total = input_.clone()
    dist.all_reduce(total, group=self.device_group)
    return total.split(sizes)[self.rank_in_group].contiguous()


CpuCommunicator.all_gatherv = _all_gatherv
CpuCommunicator.reduce_scatterv = _reduce_scatterv
