# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What INT8 and unquantized experts on a CPU share: which token goes to which expert,
and the activation."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

# The only limits of swigluoai and swiglustep that upstream's fused MoE knows.
SWIGLUOAI_ALPHA, SWIGLUOAI_LIMIT = 1.702, 7.0
SWIGLUSTEP_LIMIT = 7.0
ACTIVATIONS = (
    MoEActivation.SILU,
    MoEActivation.GELU,
    MoEActivation.SWIGLUOAI,
    MoEActivation.SWIGLUSTEP,
)


@dataclass(frozen=True)
class Pairs:
    """A token and one of its experts, P times: sorted by expert."""

    experts: torch.Tensor  # [P] int64, ascending, experts of this rank
    tokens: torch.Tensor  # [P] int64
    weights: torch.Tensor  # [P, 1], the router's

    def by_expert(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Each expert that has tokens, with its part of `tokens` and of `weights`."""
        unique, counts = self.experts.unique_consecutive(return_counts=True)
        sizes = counts.tolist()
        parts = self.tokens.split(sizes), self.weights.split(sizes)
        return zip(unique.tolist(), *parts, strict=True)


def sort_pairs(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_experts: int,
) -> Pairs:
    """The pairs of this rank, sorted by expert. An id that is no expert, negative or
    too large, adds nothing, as on GPUs.

    Args:
        topk_weights: [M, topk], float.
        topk_ids: [M, topk], integer: experts of the model if there is an `expert_map`,
            else of this rank.
        expert_map: id in the model to id on this rank, -1 where it is absent.
        num_experts: of this rank.
    """
    ids = topk_ids.flatten().long()
    if expert_map is None:
        experts = ids
    else:
        # A negative index would count from the end.
        experts = expert_map.long()[ids.clamp(0, expert_map.numel() - 1)]
        experts = experts.where((ids >= 0) & (ids < expert_map.numel()), -1)
    [here] = ((experts >= 0) & (experts < num_experts)).nonzero(as_tuple=True)
    experts, order = experts[here].sort(stable=True)
    pairs = here[order]
    return Pairs(
        experts, pairs // topk_ids.shape[1], topk_weights.flatten()[pairs].unsqueeze(1)
    )


def activate(
    activation: str, gate_up: torch.Tensor, swiglu_limit: float | None = None
) -> torch.Tensor:
    """One of `ACTIVATIONS`, in the dtype of its input.

    Args:
        activation: the value of a `MoEActivation`.
        gate_up: [P, 2N]: gates before ups, of swigluoai in turns.
        swiglu_limit: of silu alone: clips gates, before silu, and ups.

    Returns:
        [P, N].
    """
    if activation == MoEActivation.SWIGLUOAI.value:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate = gate.clamp(max=SWIGLUOAI_LIMIT)
        up = up.clamp(-SWIGLUOAI_LIMIT, SWIGLUOAI_LIMIT)
        return gate * (SWIGLUOAI_ALPHA * gate).sigmoid() * (up + 1)
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == MoEActivation.GELU.value:
        return F.gelu(gate) * up
    if swiglu_limit is not None:
        gate, up = gate.clamp(max=swiglu_limit), up.clamp(-swiglu_limit, swiglu_limit)
    gate = F.silu(gate)
    if activation == MoEActivation.SWIGLUSTEP.value:
        gate = gate.clamp(max=SWIGLUSTEP_LIMIT)
        up = up.clamp(-SWIGLUSTEP_LIMIT, SWIGLUSTEP_LIMIT)
    return gate * up
