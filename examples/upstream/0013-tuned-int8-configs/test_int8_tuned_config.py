# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tuned configs of INT8 experts are looked up.

Goes to tests/kernels/moe/test_int8_tuned_config.py.
"""

import json

import pytest
import torch

from vllm.model_executor.layers.fused_moe.config import (
    fp8_w8a8_moe_quant_config,
    int8_w8a8_moe_quant_config,
    int8_w8a16_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.fused_moe import (
    get_config_file_name,
    try_get_optimal_moe_config,
)

EXPERTS, HIDDEN, WIDTH = 12, 64, 48
SCALES = torch.ones(EXPERTS, 2 * WIDTH, 1), torch.ones(EXPERTS, HIDDEN, 1)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (
            int8_w8a8_moe_quant_config(*SCALES, None, None, per_act_token_quant=True),
            "int8_w8a8",
        ),
        (int8_w8a16_moe_quant_config(*SCALES, None, None), "int8_w8a16"),
        (fp8_w8a8_moe_quant_config(*SCALES), "fp8_w8a8"),
    ],
)
def test_config_name(config, name: str):
    assert config.config_name(torch.bfloat16) == name


def test_tuned_config_is_read(tmp_path, monkeypatch):
    tuned = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 512, "BLOCK_SIZE_K": 512}
    tuned |= {"GROUP_SIZE_M": 3, "num_warps": 2, "num_stages": 7}
    file_name = get_config_file_name(EXPERTS, WIDTH, "int8_w8a8")
    (tmp_path / file_name).write_text(json.dumps({"7": tuned}))
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    config = int8_w8a8_moe_quant_config(*SCALES, None, None, per_act_token_quant=True)
    found = try_get_optimal_moe_config(
        (EXPERTS, 2 * WIDTH, HIDDEN),
        (EXPERTS, HIDDEN, WIDTH),
        2,
        config.config_name(torch.bfloat16),
        7,
    )
    assert found.items() >= tuned.items()
