# SPDX-License-Identifier: Apache-2.0
"""A tuned config of the Triton kernel for INT8 experts.

    python reproduce.py

Writes one to a folder of its own, which VLLM_TUNED_CONFIG_FOLDER names, and exits with
1 where vLLM does not read it. A few seconds on a CPU; nothing is downloaded.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from vllm.model_executor.layers.fused_moe.config import int8_w8a8_moe_quant_config
from vllm.model_executor.layers.fused_moe.fused_moe import (
    get_config_file_name,
    try_get_optimal_moe_config,
)

EXPERTS, HIDDEN, WIDTH, TOKENS = 12, 64, 48, 7
# Tiles that no heuristic chooses.
TUNED = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 512,
    "BLOCK_SIZE_K": 512,
    "GROUP_SIZE_M": 3,
    "num_warps": 2,
    "num_stages": 7,
}


def main() -> None:
    scales = torch.ones(EXPERTS, 2 * WIDTH, 1), torch.ones(EXPERTS, HIDDEN, 1)
    config = int8_w8a8_moe_quant_config(*scales, None, None, per_act_token_quant=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VLLM_TUNED_CONFIG_FOLDER"] = folder
        name = get_config_file_name(EXPERTS, WIDTH, "int8_w8a8")
        Path(folder, name).write_text(json.dumps({str(TOKENS): TUNED}))
        found = try_get_optimal_moe_config(
            (EXPERTS, 2 * WIDTH, HIDDEN),
            (EXPERTS, HIDDEN, WIDTH),
            2,
            config.config_name(torch.bfloat16),
            TOKENS,
        )
    if {key: found.get(key) for key in TUNED} != TUNED:
        sys.exit(
            f"{name}: expected to be read, found the default config; an INT8 config "
            f"looks for dtype {config.config_name(torch.bfloat16)}"
        )
    print(f"{name}: read")


if __name__ == "__main__":
    main()
