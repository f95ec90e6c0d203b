# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What this fork's classes of experts share, quantized or not."""

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceNoOP,
)


class WholeExpertsBase(mk.FusedMoEExpertsModular):
    """Experts that take tokens [M, K] as they are, and return each token's weighted
    sum, [M, K]: all that is between is theirs."""

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    def supports_expert_map(self) -> bool:
        return True

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def takes_output(
        self, output: torch.Tensor | None, fused_out: torch.Tensor
    ) -> bool:
        """Patch 0035's question: whether `apply` may write the layer's output itself,
        like fused_out. From 0.32.0 on upstream asks nobody."""
        return (
            output is not None
            and output.shape == fused_out.shape
            and output.dtype == fused_out.dtype
            and output.is_contiguous()
        )

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The output alone: what lies between, each allocates for itself."""
        return (0,), (0,), (M, K)
