# SPDX-License-Identifier: Apache-2.0
"""Quark INT8 experts whose weights have one scale a tensor, and dynamic activations.

    python reproduce.py

Exits with 1 where the Triton kernel reads an expert's weights with another's scale.
Builds a layer on a CPU as it is built on CUDA, and looks its scales up as
`fused_moe_kernel` does. A few seconds; nothing is downloaded.
"""

import os
import sys
import tempfile
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.quantization.quark import quark_moe
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig

EXPERTS, HIDDEN, WIDTH = 4, 64, 32
WEIGHT = {"dtype": "int8", "qscheme": "per_tensor", "symmetric": True}
CONFIG = {
    "quant_method": "quark",
    "export": {"kv_cache_group": [], "pack_method": "reorder"},
    "global_quant_config": {
        "weight": {**WEIGHT, "is_dynamic": False},
        "input_tensors": {**WEIGHT, "qscheme": "per_channel", "is_dynamic": True},
    },
    "layer_quant_config": {},
    "layer_type_quant_config": {},
    "exclude": [],
}


def as_on_cuda() -> None:
    """Let the choice of a kernel be what it is on CUDA, where vLLM asks this oracle."""
    if hasattr(quark_moe, "select_int8_moe_backend"):
        from vllm.model_executor.layers.fused_moe.experts.triton_moe import (
            TritonExperts,
        )
        from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend

        chosen = (Int8MoeBackend.TRITON, TritonExperts)
        quark_moe.select_int8_moe_backend = lambda **_: chosen


def read_by_kernel(scale: torch.Tensor, expert: int, strided: bool) -> float:
    """The scale of an expert's first channel. Strided, the kernel reads at
    expert * stride(0), which is passed as 0 for a scale of one dimension; else it reads
    at the expert's place in memory."""
    values = scale.flatten()
    if not strided:
        return values[expert].item()
    return values[expert * (scale.stride(0) if scale.ndim >= 2 else 0)].item()


def make_layer() -> Any:
    as_on_cuda()
    make = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE
    layer = make(
        num_experts=EXPERTS,
        top_k=2,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        params_dtype=torch.bfloat16,
        quant_config=QuarkConfig.from_config(CONFIG),
        prefix="model.layers.0.mlp.experts",
    )
    return getattr(layer, "routed_experts", layer)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/rank", 0, "gloo")
        initialize_model_parallel(1, 1)
        layer = make_layer()
        stored = torch.arange(1, EXPERTS + 1) / 128
        layer.w13_weight.data.fill_(1)
        layer.w2_weight.data.fill_(1)
        layer.w13_weight_scale.data.copy_(stored[:, None].expand(-1, 2))
        layer.w2_weight_scale.data.copy_(stored)
        layer.quant_method.process_weights_after_loading(layer)
        config = layer.quant_method.get_fused_moe_quant_config(layer)
    strided = config.per_act_token_quant or config.use_int8_w8a16
    for name, scale in (("w13", config.w1_scale), ("w2", config.w2_scale)):
        for expert, wanted in enumerate(stored.tolist()):
            found = read_by_kernel(scale, expert, strided)
            if found != wanted:
                sys.exit(
                    f"{name} of expert {expert}: expected to be read with its scale "
                    f"{wanted}, found {found}, that of another expert"
                )
    if not config.use_int8_w8a8:
        sys.exit("expected INT8 activations, found a config of weights alone")
    print("each expert is read with its own scale")


if __name__ == "__main__":
    main()
