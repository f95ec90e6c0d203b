# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The INT8 (W8A8) fused MoE for a few tokens: two launches, which quantize as well.

With few tokens the layer takes as long as its weights take to arrive. A tile of the
tensor cores would be mostly padding.
"""

from typing import Any

import torch
from vllm.model_executor.kernels.int8_triton import has_dot4, launch, num_sms
from vllm.model_executor.layers.fused_moe.experts.quark_int8 import few_kernels
from vllm.model_executor.layers.fused_moe.experts.quark_int8.tensors import (
    Experts,
    Routing,
)
from vllm.model_executor.layers.fused_moe.experts.quark_int8.tiles import FewConfig
from vllm.utils.math_utils import cdiv, next_power_of_2


def apply_few_tokens(
    config: FewConfig,
    x: torch.Tensor,
    experts: Experts,
    routing: Routing,
    out: torch.Tensor,
) -> None:
    """`layer.apply_experts` with the given tiles; tensors are contiguous."""
    num_tokens, hidden_size = x.shape
    width, topk = experts.width, routing.topk
    num_ids = routing.num_ids(experts)
    common: dict[str, Any] = dict(
        HAS_EXPERT_MAP=routing.expert_map is not None, DOT4=has_dot4(x)
    )
    h = x.new_empty((num_tokens * topk, width))
    programs = _programs(
        width, config.w13_block_size_n, config.w13_ctas_per_sm, num_tokens * topk, x
    )
    launch(
        few_kernels.w13_few_kernel,
        (programs, num_tokens * topk),
        config.pdl,
        x,
        experts.a13_scale,
        experts.w13.view(torch.int32),
        experts.w13_scale,
        experts.w13_bias,
        routing.topk_ids,
        routing.expert_map,
        h,
        num_ids,
        width,
        hidden_size,
        topk,
        BLOCK_SIZE_N=config.w13_block_size_n,
        BLOCK_SIZE_K=next_power_of_2(hidden_size // 4),
        STATIC_X=experts.a13_scale is not None,
        PER_CHANNEL=experts.w13_scale.numel() != experts.num_experts,
        HAS_BIAS=experts.w13_bias is not None,
        SWIGLUSTEP_LIMIT=experts.swiglustep_limit,
        TURNS=programs * config.w13_block_size_n < width,
        STAGES=config.w13_stages,
        num_warps=config.w13_num_warps,
        **common,
    )
    programs = _programs(
        hidden_size, config.w2_block_size_n, config.w2_ctas_per_sm, num_tokens, x
    )
    launch(
        few_kernels.w2_few_kernel,
        (programs, num_tokens),
        config.pdl,
        h,
        experts.a2_scale,
        experts.w2.view(torch.int32),
        experts.w2_scale,
        experts.w2_bias,
        routing.topk_weights,
        routing.topk_ids,
        routing.expert_map,
        out,
        num_ids,
        hidden_size,
        width,
        topk,
        TOPK=next_power_of_2(topk),
        BLOCK_SIZE_N=config.w2_block_size_n,
        BLOCK_SIZE_K=next_power_of_2(width // 4),
        STATIC_H=experts.a2_scale is not None,
        PER_CHANNEL=experts.w2_scale.numel() != experts.num_experts,
        HAS_BIAS=experts.w2_bias is not None,
        APPLY_ROUTER_WEIGHT=routing.apply_router_weight,
        STAGES=config.w2_stages,
        num_warps=config.w2_num_warps,
        **common,
    )


def _programs(
    columns: int, block_size_n: int, ctas_per_sm: int, rows: int, x: torch.Tensor
) -> int:
    """Programs that share the columns of a row; 0 CTAs per SM: one a block."""
    programs = cdiv(columns, block_size_n)
    if ctas_per_sm:
        programs = min(programs, max(1, ctas_per_sm * num_sms(x) // rows))
    return programs
