# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Unquantized fused MoE on a CPU: routed as on GPUs, by upstream's kernel where that is
right, in torch elsewhere."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import vllm.envs as envs
import vllm.model_executor.layers.fused_moe.cpu_torch_experts  # noqa: F401, the op
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.cpu_moe_utils import ACTIVATIONS
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import (
    FusedTopKRouter,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.layer import FusedMoE


def upstream_serves(layer: "FusedMoE") -> bool:
    """Whether upstream's kernels apply these experts right, with weights as they were
    loaded.

    They read no `expert_map`. Their grouped product wants pairs of 32 rows of w13,
    which they do not ask before they pack weights. Where they have none, they count an
    expert that a token has twice once. With the router's weight on the input they take
    one expert a token and add w13's bias unweighted; their kernel for AMX knows silu
    alone, and neither that nor a bias.
    """
    # Not in newer releases, whose layers ask none of this.
    from vllm.model_executor.layers.fused_moe import cpu_fused_moe

    if (
        layer.activation not in cpu_fused_moe._CPU_MOE_ACT_FN
        or _swiglu_limit(layer) is not None
        or layer.expert_map is not None
    ):
        return False
    has_bias = _bias(layer, "w13_bias") is not None
    on_input = layer.apply_router_weight_on_input
    if envs.VLLM_CPU_SGL_KERNEL and torch.cpu._is_amx_tile_supported():
        return layer.activation is MoEActivation.SILU and not on_input and not has_bias
    grouped, _ = cpu_fused_moe.CPUFusedMOE.check_grouped_gemm(None, layer)
    return (
        grouped
        and layer.w13_weight.shape[1] % 64 == 0
        and not (on_input and (has_bias or layer.top_k > 1))
    )


class TorchExperts:
    """Applies the experts that upstream's kernels do not.

    Raises:
        NotImplementedError: unsupported activation.
    """

    def __init__(self, layer: "FusedMoE") -> None:
        limit = _swiglu_limit(layer)
        if layer.activation not in ACTIVATIONS or (
            limit is not None and layer.activation is not MoEActivation.SILU
        ):
            known = ", ".join(one.value for one in ACTIVATIONS)
            limited = "" if limit is None else f" with swiglu_limit {limit}"
            raise NotImplementedError(
                f"{layer.layer_name}: unquantized experts on a CPU know the "
                f"activations {known}, and a swiglu_limit of silu, not "
                f"{layer.activation.value}{limited}: run this model on a GPU."
            )


def apply(
    experts: Callable[..., torch.Tensor],
    layer: "FusedMoE",
    x: torch.Tensor,
    router_logits: torch.Tensor,
    input_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Route tokens with the layer's router and apply its experts.

    Args:
        experts: one of upstream's classes of `cpu_fused_moe`, or `TorchExperts`.
        x: [M, K], float.
        router_logits: [M, E], float.
        input_ids: [M], of routers that choose experts by the token.

    Returns:
        [M, K] like `x`.
    """
    topk_weights, topk_ids = _route(layer, x, router_logits, input_ids)
    if isinstance(experts, TorchExperts):
        return torch.ops.quark_int8.cpu_unquantized_experts(
            x,
            layer.w13_weight,
            layer.w2_weight,
            topk_weights,
            topk_ids,
            layer.activation.value,
            layer.apply_router_weight_on_input,
            layer.expert_map,
            _bias(layer, "w13_bias"),
            _bias(layer, "w2_bias"),
            _swiglu_limit(layer),
        )
    # Upstream's kernels write where an id points: one that is no expert would go
    # beyond their memory.
    known = (topk_ids >= 0) & (topk_ids < layer.local_num_experts)
    topk_ids = topk_ids.where(known, 0).to(torch.int32).contiguous()
    topk_weights = topk_weights.where(known, 0.0).float().contiguous()
    return experts(
        layer,
        x,
        False,
        layer.top_k,
        router_logits,
        False,
        global_num_experts=layer.global_num_experts,
        custom_routing_function=lambda **_: (topk_weights, topk_ids),
        apply_router_weight_on_input=layer.apply_router_weight_on_input,
        activation=layer.activation,
    )


def _route(
    layer: "FusedMoE",
    x: torch.Tensor,
    router_logits: torch.Tensor,
    input_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = layer.router.select_experts(x, router_logits, input_ids=input_ids)
    if layer.use_grouped_topk and isinstance(layer.router, FusedTopKRouter):
        # For want of several groups upstream chose a router without the factor, which
        # its experts on a CPU have always heeded.
        weights = weights * layer.routed_scaling_factor
    return weights, ids


def _bias(layer: "FusedMoE", name: str) -> torch.Tensor | None:
    return getattr(layer, name, None)


def _swiglu_limit(layer: "FusedMoE") -> float | None:
    return getattr(layer, "swiglu_limit", None)
