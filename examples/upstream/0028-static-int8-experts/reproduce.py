# SPDX-License-Identifier: Apache-2.0
"""Quark INT8 experts with stored scales of activations.

    python reproduce.py

Exits with 1 where such a layer has no class of experts, so that the first forward pass
ends in AttributeError. A few seconds on a CPU; nothing is downloaded.
"""

import os
import sys
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig

WEIGHT = {"dtype": "int8", "qscheme": "per_tensor", "symmetric": True}
STATIC = {**WEIGHT, "is_dynamic": False}
CONFIG = {
    "quant_method": "quark",
    "export": {"kv_cache_group": [], "pack_method": "reorder"},
    "global_quant_config": {"weight": STATIC, "input_tensors": STATIC},
    "layer_quant_config": {},
    "layer_type_quant_config": {},
    "exclude": [],
}


def main() -> None:
    make = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/rank", 0, "gloo")
        initialize_model_parallel(1, 1)
        layer = make(
            num_experts=4,
            top_k=2,
            hidden_size=64,
            intermediate_size=32,
            params_dtype=torch.bfloat16,
            quant_config=QuarkConfig.from_config(CONFIG),
            prefix="model.layers.0.mlp.experts",
        )
        experts = getattr(layer, "routed_experts", layer)
        for param in experts.parameters():
            param.data.fill_(1)
        experts.quant_method.process_weights_after_loading(experts)
    try:
        # What the runner asks in each forward pass.
        assert not experts.quant_method.is_monolithic
    except AttributeError as error:
        sys.exit(
            f"INT8 experts with static activations: expected to run, found {error!r}"
        )
    print("INT8 experts with static activations: run")


if __name__ == "__main__":
    main()
