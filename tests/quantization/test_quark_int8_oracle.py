# SPDX-License-Identifier: Apache-2.0
"""Quark's INT8 experts are applied by a modular kernel that is chosen by what it
supports; a layer that none reads right is refused by name."""

import sys
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.fused_moe.experts.triton_int8_moe  # noqa: F401
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.config import VllmConfig
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig

from tests.moe_layers import make_experts
from tests.platforms import pretended

LAYER = "model.layers.3.moe.experts"
pytestmark = pytest.mark.needs_patch("0028")


def build(quark: dict) -> Any:
    config = QuarkConfig.from_config(quark)
    return make_experts(4, 2, 64, 32, quant_config=config, prefix=LAYER)


def test_experts_are_of_a_modular_kernel(vllm_config: VllmConfig, quark_dict) -> None:
    """With which all-to-all back ends come, and the overlap with shared experts."""
    layer = build(quark_dict())
    for parameter in layer.parameters():
        parameter.data = torch.ones_like(parameter)
    layer.quant_method.process_weights_after_loading(layer)
    kernel = layer.quant_method.moe_kernel
    assert isinstance(kernel.fused_experts, mk.FusedMoEExpertsModular)


def test_scheme_that_no_kernel_reads_is_refused(
    vllm_config: VllmConfig, quark_dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock's Triton kernel took scales of other channels, in silence."""
    build(quark_dict())  # which imports the modules of the other kernels
    vllm_config.compilation_config.static_forward_context.clear()
    gpu = pretended.cuda(8, 0)
    for module in [m for n, m in sys.modules.items() if ".fused_moe.experts." in n]:
        if hasattr(module, "current_platform"):
            monkeypatch.setattr(module, "current_platform", gpu)
    monkeypatch.setattr(mk, "current_platform", gpu, raising=False)
    # Which the fork's own kernels ask whether this is a Hopper GPU.
    int8_triton = sys.modules.get("vllm.model_executor.kernels.int8_triton")
    if int8_triton is not None:
        monkeypatch.setattr(int8_triton, "current_platform", gpu)
    with pytest.raises(NotImplementedError, match=f"{LAYER}: .*scales of other"):
        build(quark_dict(static=True))
