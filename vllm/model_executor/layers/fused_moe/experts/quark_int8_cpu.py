# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""INT8 (W8A8) experts on a CPU: tokens sorted by expert, each expert's weights read
once."""

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.cpu_moe_utils import activate, sort_pairs
from vllm.model_executor.layers.fused_moe.experts.quark_int8_base import (
    Int8ExpertsBase,
)
from vllm.model_executor.layers.quantization.utils.cpu_int8_utils import (
    int8_mm,
    per_token_quant_int8,
    static_per_tensor_quant_int8,
)
from vllm.platforms import current_platform
from vllm.v1.worker.workspace import (
    init_workspace_manager,
    is_workspace_manager_initialized,
)


class Int8CpuExperts(Int8ExpertsBase):
    """INT8 experts on a CPU, of every scheme of Quark's. Quantizes its input itself."""

    # torch.compile cannot: which expert is read next depends on the routing.
    is_traced = False

    def __init__(
        self, moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig
    ) -> None:
        super().__init__(moe_config, quant_config)
        # A worker on a CPU makes none; the modular kernel takes its output there.
        if not is_workspace_manager_initialized():
            init_workspace_manager(torch.device("cpu"))

    @staticmethod
    def _supports_current_device() -> bool:
        return current_platform.is_cpu()

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        return True

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return True

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        output.copy_(
            cpu_int8_experts(
                hidden_states,
                w1,
                w2,
                topk_weights,
                topk_ids,
                activation,
                not apply_router_weight_on_input,
                expert_map,
                self.quant_config,
            )
        )


def cpu_int8_experts(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: MoEActivation,
    apply_router_weight: bool,
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
        activation: silu or swiglustep.
        apply_router_weight: weight the experts' outputs.
        expert_map: id in the model to id on this rank, -1 where it is absent.
        quant_config: `w1_scale` and `w2_scale` per channel, [E, 2N, 1] and [E, K, 1],
            or per tensor, [E]; `a1_scale` and `a2_scale` a scalar for static
            activations, None for dynamic per-token ones; `w1_bias`, [E, 2N], and
            `w2_bias`, [E, K], or None.

    Returns:
        [M, K], float32.
    """
    assert quant_config.w1_scale is not None and quant_config.w2_scale is not None
    pairs = sort_pairs(topk_weights, topk_ids, expert_map, w13.shape[0])
    experts, tokens = pairs.experts, pairs.tokens

    x_q, x_scale = _quantize(hidden_states, quant_config.a1_scale)
    x = _experts_mm(x_q[tokens], x_scale[tokens], experts, w13, quant_config.w1_scale)
    if quant_config.w1_bias is not None:
        x += quant_config.w1_bias[experts]

    x_q, x_scale = _quantize(activate(activation.value, x), quant_config.a2_scale)
    x = _experts_mm(x_q, x_scale, experts, w2, quant_config.w2_scale)
    if quant_config.w2_bias is not None:
        x += quant_config.w2_bias[experts]
    if apply_router_weight:
        x *= pairs.weights

    out = torch.zeros_like(hidden_states, dtype=torch.float32)
    return out.index_add_(0, tokens, x)


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
