# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Unquantized experts on a CPU that upstream's modular kernels do not apply, or not
right; for releases whose oracle chooses among such kernels on a CPU, too."""

import torch
import vllm.model_executor.layers.fused_moe.cpu_torch_experts  # noqa: F401, the op
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
)
from vllm.model_executor.layers.fused_moe.cpu_moe_utils import (
    ACTIVATIONS,
    SWIGLUOAI_LIMIT,
)
from vllm.model_executor.layers.fused_moe.experts.quark_base import WholeExpertsBase
from vllm.model_executor.layers.fused_moe.oracle import unquantized
from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey
from vllm.platforms import current_platform


class CpuUnquantizedExperts(WholeExpertsBase):
    """Unquantized experts in torch, where upstream's kernels are not right."""

    @staticmethod
    def is_supported_config(
        cls: type[mk.FusedMoEExperts],
        moe_config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: mk.FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        keys = weight_key, activation_key
        if cls._supports_current_device() and not _upstream_is_wrong(moe_config):
            for other in unquantized.backend_to_kernel_cls(
                unquantized.UnquantizedMoeBackend.CPU
            ):
                if (
                    other is not cls
                    and (
                        other.is_supported_config(
                            other, moe_config, *keys, activation_format
                        )[0]
                    )
                ):
                    return False, f"{other.__name__} serves"
        limit = moe_config.swiglu_limit
        fixed = {MoEActivation.SILU: limit, MoEActivation.SWIGLUOAI: SWIGLUOAI_LIMIT}
        if limit is not None and limit != fixed.get(moe_config.activation):
            return False, (
                f"a swiglu_limit of {limit} is not known of {moe_config.activation}"
            )
        return mk.FusedMoEExperts.is_supported_config(
            cls, moe_config, *keys, activation_format
        )

    @staticmethod
    def _supports_current_device() -> bool:
        return current_platform.is_cpu()

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in ACTIVATIONS

    @staticmethod
    def _supports_quant_scheme(
        weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> bool:
        return (weight_key, activation_key) == (None, None)

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
        if apply_router_weight_on_input:  # it is in hidden_states by now
            topk_weights = torch.ones_like(topk_weights)
        limit = self.quant_config.gemm1_clamp_limit
        output.copy_(
            torch.ops.quark_int8.cpu_unquantized_experts(
                hidden_states,
                w1,
                w2,
                topk_weights,
                topk_ids,
                activation.value,
                False,
                expert_map,
                self.w1_bias,
                self.w2_bias,
                limit if activation is MoEActivation.SILU else None,
            )
        )


def _upstream_is_wrong(moe_config: FusedMoEConfig) -> bool:
    """Whether upstream's kernels answer wrong what they say they support: they read no
    expert map, and clip nothing before silu."""
    return moe_config.moe_parallel_config.use_ep or (
        moe_config.swiglu_limit is not None
        and moe_config.activation is MoEActivation.SILU
    )
