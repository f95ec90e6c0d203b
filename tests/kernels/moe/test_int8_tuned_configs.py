# SPDX-License-Identifier: Apache-2.0
"""Tuned configs of upstream's INT8 (W8A8) MoE kernel: that they are looked up."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from vllm.model_executor.layers.fused_moe import fused_moe
from vllm.model_executor.layers.fused_moe.config import int8_w8a8_moe_quant_config

pytestmark = pytest.mark.needs_patch("0013")
SIZES = dict(BLOCK_SIZE_M=16, BLOCK_SIZE_N=32, BLOCK_SIZE_K=64, GROUP_SIZE_M=1)


class Launched(Exception):
    """The kernel was about to be launched, with this config."""


@pytest.fixture
def scales() -> dict[str, torch.Tensor]:
    return {"w1_scale": torch.ones(4, 32, 1), "w2_scale": torch.ones(4, 64, 1)}


def test_the_config_has_a_name(scales: dict[str, torch.Tensor]) -> None:
    config = int8_w8a8_moe_quant_config(
        **scales, a1_scale=None, a2_scale=None, per_act_token_quant=True
    )
    assert config.config_name(torch.bfloat16) == "int8_w8a8"


# Older releases ask for it.
PARAMETERS = inspect.signature(fused_moe.fused_experts_impl).parameters
INPLACE = {"inplace": False} if "inplace" in PARAMETERS else {}


def test_the_layer_takes_the_tuned_config(
    scales: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the user's, with a step of K that no default has."""
    tuned = SIZES | {"BLOCK_SIZE_K": 48, "num_warps": 4, "num_stages": 2}
    name = fused_moe.get_config_file_name(4, 16, "int8_w8a8")
    (tmp_path / name).write_text(json.dumps({"1": tuned}))
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    fused_moe.get_moe_configs.cache_clear()

    def prepare(topk_ids: object, config: dict[str, int], *_: object, **__: object):
        raise Launched(config["BLOCK_SIZE_K"])

    monkeypatch.setattr(fused_moe, "moe_kernel_quantize_input", lambda A, **_: (A, A))
    monkeypatch.setattr(fused_moe, "_prepare_expert_assignment", prepare)
    try:
        with pytest.raises(Launched, match="48"):
            fused_moe.fused_experts_impl(
                torch.randn(1, 64).bfloat16(),
                torch.zeros(4, 32, 64, dtype=torch.int8),
                torch.zeros(4, 64, 16, dtype=torch.int8),
                torch.ones(1, 2),
                torch.tensor([[0, 1]], dtype=torch.int32),
                use_int8_w8a8=True,
                per_channel_quant=True,
                **INPLACE,
                **scales,
            )
    finally:
        fused_moe.get_moe_configs.cache_clear()
