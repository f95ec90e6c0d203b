# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Quark's INT8 experts run with EPLB where each parameter has a row an expert.

Goes to tests/quantization/test_quark_int8_moe_eplb.py.
"""

from typing import Any

import pytest
import torch

from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.quantization.quark import quark_moe
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig

EXPERTS = 4


def make_experts(monkeypatch, weight_qscheme: str, static: bool) -> Any:
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend

    monkeypatch.setattr(
        quark_moe,
        "select_int8_moe_backend",
        lambda **_: (Int8MoeBackend.TRITON, TritonExperts),
        raising=False,
    )
    common = {"dtype": "int8", "symmetric": True}
    weight = {**common, "qscheme": weight_qscheme, "is_dynamic": False}
    activation = {
        **common,
        "qscheme": "per_tensor" if static else "per_channel",
        "is_dynamic": not static,
    }
    quant_config = QuarkConfig.from_config(
        {
            "quant_method": "quark",
            "export": {"kv_cache_group": [], "pack_method": "reorder"},
            "global_quant_config": {"weight": weight, "input_tensors": activation},
            "layer_quant_config": {},
            "layer_type_quant_config": {},
            "exclude": [],
        }
    )
    layer = fused_moe.FusedMoEFactory(
        num_experts=EXPERTS,
        top_k=2,
        hidden_size=64,
        intermediate_size=32,
        params_dtype=torch.bfloat16,
        quant_config=quant_config,
        prefix="model.layers.0.mlp.experts",
    )
    return layer.routed_experts


@pytest.mark.parametrize("weight_qscheme", ["per_channel", "per_tensor"])
def test_dynamic_activations(dist_init, monkeypatch, weight_qscheme: str):
    experts = make_experts(monkeypatch, weight_qscheme, static=False)
    for param in experts.parameters():
        param.data.fill_(1)
    experts.quant_method.process_weights_after_loading(experts)
    assert experts.quant_method.supports_eplb
    for name, param in experts.named_parameters():
        assert len(param) == EXPERTS, name


def test_static_activations(dist_init, monkeypatch):
    """The input scale is the largest of the experts that a rank loaded."""
    experts = make_experts(monkeypatch, "per_tensor", static=True)
    assert not experts.quant_method.supports_eplb
