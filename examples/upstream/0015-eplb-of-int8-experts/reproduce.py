# SPDX-License-Identifier: Apache-2.0
"""Expert parallel load balancing (EPLB) of Quark's INT8 experts.

    python reproduce.py

Exits with 1 where they refuse it, so that `--enable-eplb` ends in NotImplementedError,
although each of their parameters has a row for each expert, which is what EPLB moves.
A few seconds on a CPU; nothing is downloaded.
"""

import os
import sys
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.quantization.quark import quark_moe
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig

EXPERTS = 4
WEIGHT = {"dtype": "int8", "qscheme": "per_channel", "ch_axis": 0, "symmetric": True}
CONFIG = {
    "quant_method": "quark",
    "export": {"kv_cache_group": [], "pack_method": "reorder"},
    "global_quant_config": {
        "weight": {**WEIGHT, "is_dynamic": False},
        "input_tensors": {**WEIGHT, "ch_axis": 1, "is_dynamic": True},
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


def main() -> None:
    as_on_cuda()
    make = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/rank", 0, "gloo")
        initialize_model_parallel(1, 1)
        layer = make(
            num_experts=EXPERTS,
            top_k=2,
            hidden_size=64,
            intermediate_size=32,
            params_dtype=torch.bfloat16,
            quant_config=QuarkConfig.from_config(CONFIG),
            prefix="model.layers.0.mlp.experts",
        )
        experts = getattr(layer, "routed_experts", layer)
        method = experts.quant_method
        for param in experts.parameters():
            param.data.fill_(1)
        method.process_weights_after_loading(experts)
    rows = {name: len(param) for name, param in experts.named_parameters()}
    assert set(rows.values()) == {EXPERTS}, rows
    if not method.supports_eplb:
        sys.exit(
            f"{type(method).__name__}.supports_eplb: expected True, as "
            f"{', '.join(rows)} have a row for each expert, found False"
        )
    print(f"{type(method).__name__} supports EPLB")


if __name__ == "__main__":
    main()
