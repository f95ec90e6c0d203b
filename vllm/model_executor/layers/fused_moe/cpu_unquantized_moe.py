# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Unquantized fused MoE on a CPU: routed as on GPUs, by upstream's kernel where that is
right, in torch elsewhere."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import vllm.envs as envs
from vllm.model_executor.kernels.quark_int8_ops import register_op
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.cpu_moe_utils import (
    ACTIVATIONS,
    activate,
    sort_pairs,
)
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


def cpu_unquantized_experts(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    apply_router_weight_on_input: bool,
    expert_map: torch.Tensor | None,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    swiglu_limit: float | None,
) -> torch.Tensor:
    """Apply unquantized experts in torch. Products and the intermediate are rounded to
    the dtype of the weights; all else is float32.

    Args:
        hidden_states: [M, K], float.
        w13: [E, 2N, K] like `hidden_states`; w2: [E, K, N].
        topk_weights: [M, topk] float32.
        topk_ids: [M, topk], integer: experts of the model if there is an `expert_map`,
            else of this rank. An id that is no expert adds nothing.
        activation: the value of one of `ACTIVATIONS`.
        apply_router_weight_on_input: weight the first product, not the second.
        expert_map: id in the model to id on this rank, -1 where it is absent.
        w13_bias: [E, 2N]; w2_bias: [E, K].
        swiglu_limit: as in `activate`.

    Returns:
        [M, K] like `hidden_states`.
    """
    out = torch.zeros_like(hidden_states, dtype=torch.float32)
    pairs = sort_pairs(topk_weights, topk_ids, expert_map, w13.shape[0])
    for expert, tokens, weights in pairs.by_expert():
        y = F.linear(hidden_states[tokens], w13[expert]).float()
        if w13_bias is not None:
            y += w13_bias[expert]
        if apply_router_weight_on_input:
            y *= weights
        y = activate(activation, y, swiglu_limit).to(w2.dtype)
        y = F.linear(y, w2[expert]).float()
        if w2_bias is not None:
            y += w2_bias[expert]
        if not apply_router_weight_on_input:
            y *= weights
        out.index_add_(0, tokens, y)
    return out.to(hidden_states.dtype)


def _cpu_unquantized_experts_fake(hidden_states: torch.Tensor, *_) -> torch.Tensor:
    return torch.empty_like(hidden_states)


# A custom op: torch.compile cannot trace control flow that depends on the routing.
register_op(
    op_name="cpu_unquantized_experts",
    op_func=cpu_unquantized_experts,
    fake_impl=_cpu_unquantized_experts_fake,
    dispatch_key="CPU",
)
