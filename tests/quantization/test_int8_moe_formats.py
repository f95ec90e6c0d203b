# SPDX-License-Identifier: Apache-2.0
"""One checkpoint in two formats: INT8 experts of Quark and of compressed-tensors answer
the same, to the bit, where both take this fork's kernel."""

from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E501
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.platforms import current_platform

from tests.moe_layers import apply_experts, make_experts
from tests.quantization.utils import poison, random_int8, random_scales
from tests.v1.utils import HOPPER

pytestmark = pytest.mark.needs_group("kernels")

NUM_EXPERTS, TOP_K, NUM_TOKENS, HIDDEN, WIDTH = 6, 2, 5, 64, 32
ROWS = {"w1": WIDTH, "w3": WIDTH, "w2": HIDDEN}
COLUMNS = {"w1": HIDDEN, "w3": HIDDEN, "w2": WIDTH}


def compressed_tensors() -> CompressedTensorsConfig:
    def scheme(**options: Any) -> dict[str, Any]:
        return {"num_bits": 8, "type": "int", "symmetric": True, **options}

    group = {
        "targets": ["Linear"],
        "weights": scheme(strategy="channel", dynamic=False),
        "input_activations": scheme(strategy="token", dynamic=True),
    }
    return CompressedTensorsConfig.from_config(
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": group},
            "ignore": [],
        }
    )


def make_layer(config: Any) -> Any:
    index = int(isinstance(config, QuarkConfig))  # names of layers are not given twice
    return make_experts(
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        quant_config=config,
        prefix=f"model.layers.{index}.mlp.experts",
    )


def build(config: Any, weights: dict[str, Tensor], scales: dict[str, Tensor]) -> Any:
    """A layer that has loaded these experts, [E, N, K] and [E, N, 1] by shard."""
    layer = make_layer(config)
    poison(layer)
    vectors = isinstance(config, QuarkConfig)  # which stores a scale as [N]
    for shard in ROWS:
        prefix = "w2_" if shard == "w2" else "w13_"
        for expert_id in range(NUM_EXPERTS):
            scale = scales[shard][expert_id]
            for name, tensor in (
                ("weight", weights[shard][expert_id]),
                ("weight_scale", scale.flatten() if vectors else scale),
            ):
                param = getattr(layer, prefix + name)
                param.weight_loader(
                    param, tensor, prefix + name, shard_id=shard, expert_id=expert_id
                )
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.skipif(
    not (current_platform.is_cpu() or torch.cuda.is_available()),
    reason="needs a CPU, or a CUDA or ROCm GPU",
)
@pytest.mark.parametrize("num_tokens", [1, NUM_TOKENS, 300])
def test_both_formats_answer_alike(
    num_tokens: int, vllm_config: VllmConfig, quark_dict: Any, rng: torch.Generator
) -> None:
    vllm_config.kernel_config.moe_backend = "quark_int8"
    weights = {
        s: random_int8(NUM_EXPERTS, n, COLUMNS[s], rng=rng) for s, n in ROWS.items()
    }
    scales = {s: random_scales(NUM_EXPERTS, n, 1, rng=rng) for s, n in ROWS.items()}
    x = torch.randn(num_tokens, HIDDEN, generator=rng, device="cpu").bfloat16()
    order = torch.rand(num_tokens, NUM_EXPERTS, generator=rng, device="cpu").argsort()
    topk_weights = torch.rand(num_tokens, TOP_K, generator=rng, device="cpu")

    outputs = []
    for config in (QuarkConfig.from_config(quark_dict()), compressed_tensors()):
        layer = build(config, weights, scales)
        device = layer.w13_weight.device
        output = apply_experts(
            layer,
            x.to(device),
            topk_weights.float().to(device),
            order[:, :TOP_K].int().to(device),
        )
        outputs.append(output.cpu())
    assert outputs[0].isfinite().all() and outputs[0].any()
    assert torch.equal(*outputs)


@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
def test_quark_takes_it_by_itself_and_compressed_tensors_does_not(
    vllm_config: VllmConfig, quark_dict: Any
) -> None:
    def kernel(config: Any) -> str:
        return make_layer(config).quant_method.experts_cls.__name__

    assert kernel(QuarkConfig.from_config(quark_dict())) == "Int8Experts"
    assert kernel(compressed_tensors()) == "TritonExperts"
