# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the classes of INT8 (W8A8) experts share, whatever multiplies in them."""

import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.quark_base import WholeExpertsBase
from vllm.model_executor.layers.fused_moe.oracle.quark_int8 import SCHEMES
from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey


class Int8ExpertsBase(WholeExpertsBase):
    """INT8 experts that quantize their tokens themselves."""

    @staticmethod
    def _supports_quant_scheme(
        weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> bool:
        return (weight_key, activation_key) in SCHEMES

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in (MoEActivation.SILU, MoEActivation.SWIGLUSTEP)

    @staticmethod
    def is_supported_config(
        cls: type[mk.FusedMoEExperts],
        moe_config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: mk.FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        """Upstream's question, and whether a limit is to clip before SiLU, which these
        experts do not; from 0.27.0 on upstream's do."""
        limit = getattr(moe_config, "swiglu_limit", None)
        if limit is not None and moe_config.activation is MoEActivation.SILU:
            return False, f"this fork's experts clip no SiLU at {limit}"
        return mk.FusedMoEExperts.is_supported_config(
            cls, moe_config, weight_key, activation_key, activation_format
        )
