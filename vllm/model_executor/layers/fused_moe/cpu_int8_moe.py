# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""INT8 (W8A8) fused MoE on a CPU: tokens sorted by expert, each expert's weights read
once."""

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.cpu_moe_utils import activate, sort_pairs
from vllm.model_executor.layers.quantization.utils.cpu_int8_utils import (
    int8_mm,
    per_token_quant_int8,
    static_per_tensor_quant_int8,
)
from vllm.utils.torch_utils import direct_register_custom_op

ACTIVATIONS = (MoEActivation.SILU, MoEActivation.SWIGLUSTEP)


def cpu_int8_fused_experts(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: MoEActivation,
    apply_router_weight_on_input: bool,
    expert_map: torch.Tensor | None,
    quant_config: FusedMoEQuantConfig,
) -> torch.Tensor:
    """Apply INT8 experts: upstream's `fused_experts` for W8A8, on a CPU.

    Integer products are exact. All between them is float32, where upstream's kernels
    round to the dtype of `hidden_states`.

    Args:
        hidden_states: [M, K], float.
        w13: [E, 2N, K] int8, the gate projection above the up projection.
        w2: [E, K, N] int8.
        topk_weights: [M, topk] float32.
        topk_ids: [M, topk], integer: experts of the model if there is an `expert_map`,
            else of this rank. An id that is no expert adds nothing.
        activation: one of `ACTIVATIONS`.
        apply_router_weight_on_input: weight the first product, not the second.
        expert_map: id in the model to id on this rank, -1 where it is absent.
        quant_config: `w1_scale` and `w2_scale` per channel, [E, 2N, 1] and [E, K, 1],
            or per tensor, [E]; `a1_scale` and `a2_scale` a scalar for static
            activations, None for dynamic per-token ones; `w1_bias`, [E, 2N], and
            `w2_bias`, [E, K], or None.

    Returns:
        [M, K] like `hidden_states`.

    Raises:
        ValueError: unsupported activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"INT8 experts on a CPU know the activations "
            f"{', '.join(a.value for a in ACTIVATIONS)}, not {activation.value}: run "
            "this model unquantized or on a GPU."
        )
    return torch.ops.vllm.cpu_int8_fused_experts(
        hidden_states,
        w13,
        w2,
        topk_weights,
        topk_ids,
        activation.value,
        apply_router_weight_on_input,
        expert_map,
        quant_config.w1_scale,
        quant_config.w2_scale,
        quant_config.a1_scale,
        quant_config.a2_scale,
        quant_config.w1_bias,
        quant_config.w2_bias,
    )


def _cpu_int8_fused_experts(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    apply_router_weight_on_input: bool,
    expert_map: torch.Tensor | None,
    w13_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    a13_scale: torch.Tensor | None,
    a2_scale: torch.Tensor | None,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
) -> torch.Tensor:
    pairs = sort_pairs(topk_weights, topk_ids, expert_map, w13.shape[0])
    experts, tokens = pairs.experts, pairs.tokens

    x_q, x_scale = _quantize(hidden_states, a13_scale)
    x = _experts_mm(x_q[tokens], x_scale[tokens], experts, w13, w13_scale)
    if w13_bias is not None:
        x += w13_bias[experts]
    if apply_router_weight_on_input:
        x *= pairs.weights

    x_q, x_scale = _quantize(activate(activation, x), a2_scale)
    x = _experts_mm(x_q, x_scale, experts, w2, w2_scale)
    if w2_bias is not None:
        x += w2_bias[experts]
    if not apply_router_weight_on_input:
        x *= pairs.weights

    out = torch.zeros_like(hidden_states, dtype=torch.float32)
    return out.index_add_(0, tokens, x).to(hidden_states.dtype)


def _experts_mm(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    experts: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
) -> torch.Tensor:
    """Each row times the weight of its expert, scaled.

    Args:
        x_q: [P, K] int8, and x_scale: [P, 1] float32.
        experts: [P] int64, ascending.
        weight: [E, N, K] int8, and weight_scale: [E, N, 1] or [E] float32.

    Returns:
        [P, N] float32.
    """
    out = x_scale.new_empty((x_q.shape[0], weight.shape[1]))
    unique, counts = experts.unique_consecutive(return_counts=True)
    parts = [t.split(counts.tolist()) for t in (x_q, x_scale, out)]
    for expert, rows, scale, out_rows in zip(unique.tolist(), *parts, strict=True):
        torch.mul(int8_mm(rows, weight[expert]), scale, out=out_rows)
        out_rows *= weight_scale[expert].flatten()
    return out


def _quantize(
    x: torch.Tensor, static_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if static_scale is None:
        return per_token_quant_int8(x)
    return static_per_tensor_quant_int8(x, static_scale)


def _cpu_int8_fused_experts_fake(hidden_states: torch.Tensor, *_) -> torch.Tensor:
    return torch.empty_like(hidden_states)


# A custom op: torch.compile cannot trace control flow that depends on the routing.
direct_register_custom_op(
    op_name="cpu_int8_fused_experts",
    op_func=_cpu_int8_fused_experts,
    fake_impl=_cpu_int8_fused_experts_fake,
    dispatch_key="CPU",
)
