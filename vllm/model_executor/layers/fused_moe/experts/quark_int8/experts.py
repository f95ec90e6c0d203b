# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""INT8 (W8A8) experts behind vLLM's modular kernel, on GPUs."""

import functools

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.kernels.int8_triton import is_hopper
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
)
from vllm.model_executor.layers.fused_moe.experts.quark_int8.layer import apply_experts
from vllm.model_executor.layers.fused_moe.experts.quark_int8.tensors import (
    DTYPES,
    SIZES_STEP,
    Experts,
    Routing,
    knows_sizes,
)
from vllm.model_executor.layers.fused_moe.experts.quark_int8_base import (
    Int8ExpertsBase,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey
from vllm.platforms import current_platform

# The only limit of swiglustep that upstream's fused MoE knows.
SWIGLUSTEP_LIMIT = 7.0


class Int8Experts(Int8ExpertsBase):
    """INT8 experts in Triton, and in Gluon on Hopper.

    Reads weights per channel or per tensor and activations per token or static, each
    with each. Quantizes its input itself: that costs nothing beside sorting.
    """

    @staticmethod
    def is_supported_config(
        cls: type[mk.FusedMoEExperts],
        moe_config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: mk.FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        supported, reason = Int8ExpertsBase.is_supported_config(
            cls, moe_config, weight_key, activation_key, activation_format
        )
        reason = reason if not supported else why_not(moe_config)
        return reason is None, reason

    @staticmethod
    def _supports_current_device() -> bool:
        # Older GPUs of NVIDIA have no INT8 tensor cores that Triton knows.
        return current_platform.is_rocm() or (
            current_platform.is_cuda() and current_platform.has_device_capability(80)
        )

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        return not (
            moe_parallel_config.use_fi_nvl_two_sided_kernels
            or moe_parallel_config.use_fi_nvl_one_sided_kernels
        )

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
        assert self.w1_scale is not None and self.w2_scale is not None
        swiglustep = activation == MoEActivation.SWIGLUSTEP
        experts = Experts(
            w1,
            w2,
            self.w1_scale,
            self.w2_scale,
            self.a1_scale,
            self.a2_scale,
            self.w1_bias,
            self.w2_bias,
            SWIGLUSTEP_LIMIT if swiglustep else None,
        )
        routing = Routing(
            topk_ids.contiguous(),
            topk_weights.contiguous(),
            expert_map,
            not apply_router_weight_on_input,
        )
        apply_experts(hidden_states.contiguous(), experts, routing, output)


def why_not(moe_config: FusedMoEConfig) -> str | None:
    """What else than upstream asks for is missing, None where nothing is."""
    if moe_config.moe_backend != "quark_int8" and not is_hopper():
        return "kernel was measured on Hopper alone; --moe-backend quark_int8 tries it"
    if is_hopper() and not _has_gluon():
        return "this Triton has no Gluon that the kernel can be written in"
    if moe_config.in_dtype not in DTYPES:
        return f"kernel does not support dtype {moe_config.in_dtype}"
    hidden_size = moe_config.hidden_dim
    width = moe_config.intermediate_size_per_partition
    if not knows_sizes(hidden_size, width):
        return (
            f"the hidden size {hidden_size} and a rank's width {width} are not both "
            f"multiples of {SIZES_STEP}"
        )
    return None


@functools.cache
def _has_gluon() -> bool:
    try:
        from vllm.model_executor.layers.fused_moe.experts.quark_int8 import (  # noqa: F401
            hopper_kernels,
        )
    # Gluon is experimental: names come and go.
    except (ImportError, AttributeError):
        return False
    return True
