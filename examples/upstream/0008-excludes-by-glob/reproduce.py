# SPDX-License-Identifier: Apache-2.0
"""Quark's `exclude` may hold globs, its own defaults among them: `*lm_head`, `*.gate`.

    python reproduce.py

Exits with 1 where vLLM reads a layer as INT8 that a glob excludes. Its weight is
bfloat16 in the checkpoint and it has no scale there, so that the model answers garbage.
A few seconds on a CPU; nothing is downloaded.
"""

import os
import sys
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig

NAME = "model.layers.0.mlp.shared_expert.down_proj"
GLOB = "*.shared_expert.*"
WEIGHT = {"dtype": "int8", "qscheme": "per_channel", "ch_axis": 0, "symmetric": True}
INPUT = {**WEIGHT, "ch_axis": 1}
CONFIG = {
    "quant_method": "quark",
    "export": {"kv_cache_group": [], "pack_method": "reorder"},
    "global_quant_config": {
        "weight": {**WEIGHT, "is_dynamic": False},
        "input_tensors": {**INPUT, "is_dynamic": True},
    },
    "layer_quant_config": {},
    "layer_type_quant_config": {},
    "exclude": [GLOB],
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/rank", 0, "gloo")
        initialize_model_parallel(1, 1)
        config = QuarkConfig.from_config(CONFIG)
        layer = ReplicatedLinear(64, 64, quant_config=config, prefix=NAME)
    method = layer.quant_method
    if not isinstance(method, UnquantizedLinearMethod):
        sys.exit(
            f"{NAME}: expected no quantization, as exclude has {GLOB!r}, found "
            f"{type(method).__name__}"
        )
    print(f"{NAME}: excluded by {GLOB!r}")


if __name__ == "__main__":
    main()
