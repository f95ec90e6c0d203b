# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What differs between vLLM releases, told by what exists and not by the version."""

from torch import nn

# The module that holds a layer's experts and asks for a quantization method.
ExpertsLayer: type[nn.Module]
try:  # from 0.24.0
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    ExpertsLayer = RoutedExperts
except ImportError:
    from vllm.model_executor.layers.fused_moe.layer import FusedMoE

    ExpertsLayer = FusedMoE


def num_logical_experts(layer: nn.Module) -> int | None:
    """How many experts a layer's checkpoint has, without EPLB's copies; None of a
    module that is no layer of experts."""
    number = getattr(layer, "logical_num_experts", None)
    if number is None:  # from 0.33.0
        number = getattr(
            getattr(layer, "moe_config", None), "num_logical_experts", None
        )
    return number
