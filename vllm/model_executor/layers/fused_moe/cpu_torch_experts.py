# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Unquantized experts in torch, for a CPU."""

import torch
import torch.nn.functional as F
from vllm.model_executor.kernels.quark_int8_ops import register_op
from vllm.model_executor.layers.fused_moe.cpu_moe_utils import activate, sort_pairs


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
