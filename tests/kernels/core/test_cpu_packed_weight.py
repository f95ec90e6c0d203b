# SPDX-License-Identifier: Apache-2.0
"""Float linear layers on a CPU, whose weights are packed when they have been loaded: a
router of float32 weights in a bfloat16 model, against float64."""

from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.platforms import current_platform

pytestmark = [
    pytest.mark.skipif(
        not current_platform.is_cpu(), reason="needs a vLLM built for CPUs"
    ),
    pytest.mark.needs_group("cpu"),
]

NUM_EXPERTS = 12
FLOAT: Any = {"dtype": torch.float32, "device": "cpu"}


@pytest.mark.parametrize("num_tokens", [1, 7, 300])
@pytest.mark.parametrize("hidden_size", [64, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_router_of_a_bfloat16_model(
    dtype: torch.dtype,
    hidden_size: int,
    num_tokens: int,
    rng: torch.Generator,
    vllm_config: VllmConfig,
) -> None:
    """As MiniMax-M2 and Nemotron-H make it: the default dtype is the model's."""
    gate = GateLinear(
        hidden_size, NUM_EXPERTS, params_dtype=dtype, out_dtype=torch.float32
    )
    weight = torch.randn(NUM_EXPERTS, hidden_size, generator=rng, **FLOAT).to(dtype)
    gate.weight.data.copy_(weight)
    gate.quant_method.process_weights_after_loading(gate)
    # Before it multiplies: with another dtype it writes where it may not.
    assert gate.weight.dtype == dtype

    x = torch.randn(num_tokens, hidden_size, generator=rng, **FLOAT).bfloat16()
    logits, _ = gate(x)
    expected = x.double() @ weight.double().T
    bound = 2**-8 if dtype == torch.bfloat16 else 1e-6
    scale = x.double().abs() @ weight.double().abs().T
    assert logits.dtype == torch.float32
    assert ((logits.double() - expected).abs() <= bound * scale).all()
