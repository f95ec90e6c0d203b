# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Scales of Quark's INT8 experts whose weights have one scale a tensor.

Goes to tests/quantization/test_quark_int8_moe_scales.py.
"""

import pytest
import torch

from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.quantization.quark import quark_moe
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig

EXPERTS, HIDDEN, WIDTH = 4, 64, 32


def choose_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where the oracle chooses it."""
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend

    monkeypatch.setattr(
        quark_moe,
        "select_int8_moe_backend",
        lambda **_: (Int8MoeBackend.TRITON, TritonExperts),
        raising=False,
    )


@pytest.fixture
def layer(dist_init, monkeypatch) -> torch.nn.Module:
    choose_triton(monkeypatch)
    common = {"dtype": "int8", "symmetric": True}
    quant_config = QuarkConfig.from_config(
        {
            "quant_method": "quark",
            "export": {"kv_cache_group": [], "pack_method": "reorder"},
            "global_quant_config": {
                "weight": {**common, "qscheme": "per_tensor", "is_dynamic": False},
                "input_tensors": {
                    **common,
                    "qscheme": "per_channel",
                    "is_dynamic": True,
                },
            },
            "layer_quant_config": {},
            "layer_type_quant_config": {},
            "exclude": [],
        }
    )
    made = fused_moe.FusedMoEFactory(
        num_experts=EXPERTS,
        top_k=2,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        params_dtype=torch.bfloat16,
        quant_config=quant_config,
        prefix="model.layers.0.mlp.experts",
    )
    return made.routed_experts


def test_per_tensor_weights_with_dynamic_activations(layer):
    w1_and_w3 = torch.rand(EXPERTS, 2) + 1
    w2 = torch.rand(EXPERTS) + 1
    layer.w13_weight.data.random_(-127, 128)
    layer.w2_weight.data.random_(-127, 128)
    before = layer.w13_weight.clone()
    layer.w13_weight_scale.data.copy_(w1_and_w3)
    layer.w2_weight_scale.data.copy_(w2)
    layer.quant_method.process_weights_after_loading(layer)
    config = layer.quant_method.get_fused_moe_quant_config(layer)

    # Activations are INT8, with a scale a token; weights have one a channel then.
    assert config.use_int8_w8a8
    assert config.per_act_token_quant
    wanted = w1_and_w3.repeat_interleave(WIDTH, dim=1)
    torch.testing.assert_close(config.w1_scale, wanted.unsqueeze(-1))
    wanted = w2[:, None].expand(-1, HIDDEN)
    torch.testing.assert_close(config.w2_scale, wanted.unsqueeze(-1))
    # No weight is rounded a second time.
    assert torch.equal(layer.w13_weight, before)
