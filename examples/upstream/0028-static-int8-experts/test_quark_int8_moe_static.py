# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Quark's INT8 experts with stored scales of activations have a kernel.

Goes to tests/quantization/test_quark_int8_moe_static.py.
"""

import pytest
import torch

from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig


@pytest.fixture(params=["per_tensor", "per_channel"])
def experts(dist_init, request) -> torch.nn.Module:
    static = {"dtype": "int8", "symmetric": True, "is_dynamic": False}
    quant_config = QuarkConfig.from_config(
        {
            "quant_method": "quark",
            "export": {"kv_cache_group": [], "pack_method": "reorder"},
            "global_quant_config": {
                "weight": {**static, "qscheme": request.param},
                "input_tensors": {**static, "qscheme": "per_tensor"},
            },
            "layer_quant_config": {},
            "layer_type_quant_config": {},
            "exclude": [],
        }
    )
    layer = fused_moe.FusedMoEFactory(
        num_experts=4,
        top_k=2,
        hidden_size=64,
        intermediate_size=32,
        params_dtype=torch.bfloat16,
        quant_config=quant_config,
        prefix="model.layers.0.mlp.experts",
    )
    return layer.routed_experts


def test_is_monolithic(experts):
    """The runner asks it in each forward pass, before the first one too."""
    assert not experts.quant_method.is_monolithic
    for param in experts.parameters():
        param.data.fill_(1)
    experts.quant_method.process_weights_after_loading(experts)
    assert not experts.quant_method.is_monolithic
