# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Upstream's Triton kernel for INT8 (W8A8) experts, behind the modular kernel.

Upstream's own class of this kind, TritonExperts, takes no INT8 input.
"""

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe import fused_experts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
)
from vllm.model_executor.layers.fused_moe.experts.quark_int8_base import (
    Int8ExpertsBase,
)
from vllm.model_executor.layers.fused_moe.oracle.quark_int8 import (
    SCHEMES,
    kInt8StaticChannelSym,
    kInt8StaticTensorSym,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey
from vllm.platforms import current_platform


class TritonInt8Experts(Int8ExpertsBase):
    """`fused_experts` as upstream's Quark method calls it, on any device but a CPU.

    Refuses only what that call answers wrong or cannot take: nobody else is asked, so
    that whatever upstream computes right stays.
    """

    @staticmethod
    def is_supported_config(
        cls: type[mk.FusedMoEExperts],
        moe_config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: mk.FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        if not cls._supports_current_device():
            return False, "kernel is written in Triton, which does not run on a CPU"
        if not cls._supports_quant_scheme(weight_key, activation_key):
            return False, (
                "kernel reads scales of other channels where weights are per channel "
                "and activations static; export with dynamic activations"
            )
        if activation_format != cls.activation_format():
            return (
                False,
                f"kernel does not support {activation_format.value} activations",
            )
        return True, None

    @staticmethod
    def _supports_current_device() -> bool:
        return not current_platform.is_cpu()

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(
        weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> bool:
        scheme = (weight_key, activation_key)
        return scheme in SCHEMES and scheme != (
            kInt8StaticChannelSym,
            kInt8StaticTensorSym,
        )

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return True

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
        if apply_router_weight_on_input:
            # It is in hidden_states by now, and one product or the other must have one.
            topk_weights = torch.ones_like(topk_weights)
        output.copy_(
            fused_experts(
                hidden_states=hidden_states,
                w1=w1,
                w2=w2,
                topk_weights=topk_weights,
                topk_ids=topk_ids,
                activation=activation,
                global_num_experts=global_num_experts,
                expert_map=expert_map,
                quant_config=self.quant_config,
            )
        )
