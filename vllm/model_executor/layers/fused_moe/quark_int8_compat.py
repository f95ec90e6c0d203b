# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What differs between vLLM releases, told by what exists and not by the version."""

import inspect
from typing import Any

import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import nn
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.oracle import int8

# The module that holds a layer's experts and asks for a quantization method.
ExpertsLayer: Any
try:  # from 0.24.0
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    ExpertsLayer = RoutedExperts
except ImportError:
    from vllm.model_executor.layers.fused_moe.layer import FusedMoE

    ExpertsLayer = FusedMoE


def num_logical_experts(layer: nn.Module) -> int | None:
    """How many experts a layer's checkpoint has, without EPLB's copies; None of a
    module that is no layer of experts."""
    moe_config = getattr(layer, "moe_config", None)
    return None if moe_config is None else moe_config.num_logical_experts


def make_int8_moe_kernel(
    layer: Any,
    moe_quant_config: FusedMoEQuantConfig,
    moe_config: FusedMoEConfig,
    experts_cls: type[mk.FusedMoEExperts],
) -> mk.FusedMoEKernel:
    """The modular kernel of a layer of INT8 experts, from upstream's function of this
    name, whose parameters differ."""
    if hasattr(layer, "_expert_routing_tables"):  # from 0.24.0
        routing_tables = layer._expert_routing_tables()
    else:
        routing_tables = layer._maybe_init_expert_routing_tables()
    given = {
        # Only Humming's is made otherwise than the rest.
        "int8_backend": int8.Int8MoeBackend.TRITON,
        "moe_quant_config": moe_quant_config,
        "moe_config": moe_config,
        "experts_cls": experts_cls,
        "routing_tables": routing_tables,
        # From 0.24.0 the layer's method is given them with each call instead.
        "shared_experts": getattr(layer, "shared_experts", None),
    }
    parameters = inspect.signature(int8.make_int8_moe_kernel).parameters
    return int8.make_int8_moe_kernel(
        **{name: value for name, value in given.items() if name in parameters}
    )
