# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Quark's exclude and override lists may hold globs.

Goes to tests/quantization/test_quark_globs.py.
"""

import pytest

from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.quark.quark import (
    QuarkConfig,
    QuarkLinearMethod,
)


def quant(weight_qscheme: str) -> dict:
    common = {"dtype": "int8", "symmetric": True}
    return {
        "weight": {**common, "qscheme": weight_qscheme, "is_dynamic": False},
        "input_tensors": {**common, "qscheme": "per_channel", "is_dynamic": True},
    }


def make_linear(name: str, **config) -> ReplicatedLinear:
    quant_config = QuarkConfig.from_config(
        {
            "quant_method": "quark",
            "export": {"kv_cache_group": [], "pack_method": "reorder"},
            "global_quant_config": quant("per_channel"),
            "layer_quant_config": {},
            "layer_type_quant_config": {},
            "exclude": [],
            **config,
        }
    )
    return ReplicatedLinear(64, 64, quant_config=quant_config, prefix=name)


@pytest.mark.parametrize(
    ("name", "pattern", "excluded"),
    [
        ("lm_head", "*lm_head", True),
        ("model.layers.0.mlp.gate", "*.gate", True),
        ("model.layers.0.mlp.gate_proj", "*.gate", False),
        ("model.layers.3.mlp.down_proj", "model.layers.[0-3].mlp.*", True),
        ("model.layers.4.mlp.down_proj", "model.layers.[0-3].mlp.*", False),
        ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj", True),
        ("model.layers.0.mlp.down_proj", "re:.*down_proj", True),
    ],
)
def test_exclude(dist_init, name: str, pattern: str, excluded: bool):
    layer = make_linear(name, exclude=[pattern])
    expected = UnquantizedLinearMethod if excluded else QuarkLinearMethod
    assert isinstance(layer.quant_method, expected)


@pytest.mark.parametrize(
    ("pattern", "qscheme"),
    [("*.o_proj", "per_tensor"), ("*.[!o]_proj", "per_channel")],
)
def test_layer_quant_config(dist_init, pattern: str, qscheme: str):
    layer = make_linear(
        "model.layers.0.self_attn.o_proj",
        layer_quant_config={pattern: quant("per_tensor")},
    )
    assert layer.scheme.qscheme == qscheme
