# SPDX-License-Identifier: Apache-2.0
"""Experts behind vLLM's modular kernel, without a model."""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.quark_int8_compat import make_int8_moe_kernel
from vllm.v1.worker.workspace import (
    init_workspace_manager,
    is_workspace_manager_initialized,
)

from tests.kernels.utils import DEVICE


def make_moe_config(
    num_experts: int,
    top_k: int,
    hidden: int,
    width: int,
    num_local_experts: int | None = None,
    activation: MoEActivation = MoEActivation.SILU,
    in_dtype: torch.dtype = torch.float32,
    **attributes: Any,
) -> FusedMoEConfig:
    """Of one rank; `attributes` such as moe_backend are set on it."""
    given = {
        "num_experts": num_experts,
        "experts_per_token": top_k,
        "hidden_dim": hidden,
        "num_local_experts": num_local_experts or num_experts,
        "num_logical_experts": num_experts,
        "activation": activation,
        "device": DEVICE,
        "routing_method": RoutingMethodType.Unspecified,
        "moe_parallel_config": FusedMoEParallelConfig.make_no_parallel(),
        "in_dtype": in_dtype,
        # Releases have one of the two.
        "intermediate_size": width,
        "intermediate_size_per_partition": width,
        "disable_inplace": True,
    }
    known = {each.name for each in fields(FusedMoEConfig) if each.init}
    if "intermediate_size" in known:
        del given["intermediate_size_per_partition"]
    config = FusedMoEConfig(**{k: v for k, v in given.items() if k in known})
    for name, value in attributes.items():
        setattr(config, name, value)
    return config


def run_experts_class(
    experts_cls: type[mk.FusedMoEExperts],
    moe_config: FusedMoEConfig,
    quant_config: FusedMoEQuantConfig,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
) -> Tensor:
    """What the modular kernel with these experts makes of x [M, K]."""
    return make_kernel(experts_cls, moe_config, quant_config).apply(
        x,
        w13,
        w2,
        topk_weights,
        topk_ids,
        activation=moe_config.activation,
        global_num_experts=moe_config.num_experts,
        expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input,
    )


def make_kernel(
    experts_cls: type[mk.FusedMoEExperts],
    moe_config: FusedMoEConfig,
    quant_config: FusedMoEQuantConfig,
) -> mk.FusedMoEKernel:
    if not is_workspace_manager_initialized():
        init_workspace_manager(torch.device(DEVICE))
    layer = SimpleNamespace(_maybe_init_expert_routing_tables=lambda: None)
    return make_int8_moe_kernel(layer, quant_config, moe_config, experts_cls)
