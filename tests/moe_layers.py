# SPDX-License-Identifier: Apache-2.0
"""Layers of experts, built and asked as the installed release has it: up to 0.23.0 a
layer is one module, from 0.24.0 a runner that holds the module with the weights."""

import inspect
from typing import Any

from torch import Tensor
from vllm.model_executor.layers.fused_moe import layer as upstream

_MAKE: Any = getattr(upstream, "FusedMoEFactory", None) or upstream.FusedMoE

# The class of the module that holds the weights.
ExpertsModule: Any = getattr(upstream, "RoutedExperts", _MAKE)


def make_moe(*args: Any, **kwargs: Any) -> Any:
    """What a model builds, with the arguments of upstream's FusedMoE."""
    return _MAKE(*args, **kwargs)


def experts_of(moe: Any) -> Any:
    """The module that holds the weights."""
    return getattr(moe, "routed_experts", moe)


def plain_name(name: str) -> str:
    """A module's or parameter's name as it is where the layer is one module."""
    return name.replace(".experts.routed_experts", ".experts")


def make_experts(*args: Any, **kwargs: Any) -> Any:
    return experts_of(make_moe(*args, **kwargs))


def quant_config_of(layer: Any) -> Any:
    """What the kernels are told of a layer whose weights are processed."""
    for name in ("ensure_moe_quant_config_init", "_ensure_moe_quant_config_init"):
        if hasattr(layer, name):
            getattr(layer, name)()
    return layer.quant_method.moe_quant_config


def apply_experts(
    layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor
) -> Tensor:
    """The output [M, K] of a layer whose weights are processed."""
    assert quant_config_of(layer) is not None
    apply = layer.quant_method.apply
    given = [layer, x, topk_weights, topk_ids]
    shared = [None] * (len(inspect.signature(apply).parameters) - len(given))
    return apply(*given, *shared)
