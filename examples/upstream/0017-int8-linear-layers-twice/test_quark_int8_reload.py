# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Weights of Quark's INT8 linear layers are loaded a second time.

Goes to tests/quantization/test_quark_int8_reload.py.
"""

import pytest
import torch

from vllm.model_executor.kernels.linear.scaled_mm.cutlass import (
    CutlassInt8ScaledMMLinearKernel,
)
from vllm.model_executor.kernels.linear.scaled_mm.triton import (
    TritonInt8ScaledMMLinearKernel,
)
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

SIZE = 64


def make_linear(monkeypatch, kernel_cls, static: bool) -> ReplicatedLinear:
    common = {"dtype": "int8", "symmetric": True}
    activation = {
        **common,
        "qscheme": "per_tensor" if static else "per_channel",
        "is_dynamic": not static,
    }
    weight = {**common, "qscheme": "per_channel", "is_dynamic": False}
    quant_config = QuarkConfig.from_config(
        {
            "quant_method": "quark",
            "export": {"kv_cache_group": [], "pack_method": "reorder"},
            "global_quant_config": {"weight": weight, "input_tensors": activation},
            "layer_quant_config": {},
            "layer_type_quant_config": {},
            "exclude": [],
        }
    )
    layer = ReplicatedLinear(
        SIZE, SIZE, bias=False, quant_config=quant_config, prefix="fc"
    )
    # These multiply on GPUs, but prepare their weights anywhere.
    monkeypatch.setattr(kernel_cls, "is_supported", lambda *_: (True, None))
    kernel = layer.scheme.kernel
    layer.scheme.kernel = kernel_cls(kernel.config, kernel.layer_param_names)
    return layer


def load(layer: ReplicatedLinear, value: int, static: bool) -> None:
    weights = {
        "weight": torch.full((SIZE, SIZE), value, dtype=torch.int8),
        "weight_scale": torch.full((SIZE,), value / 128),
    }
    if static:
        weights["input_scale"] = torch.tensor([value / 64])
    for name, weight in weights.items():
        param = getattr(layer, name)
        param.weight_loader(param, weight)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    "kernel_cls", [CutlassInt8ScaledMMLinearKernel, TritonInt8ScaledMMLinearKernel]
)
def test_reload(dist_init, monkeypatch, kernel_cls, static: bool):
    layer = make_linear(monkeypatch, kernel_cls, static)
    record_metadata_for_reloading(layer)
    load(layer, 1, static)
    layer.quant_method.process_weights_after_loading(layer)
    for value in (2, 3):
        initialize_layerwise_reload(layer)
        load(layer, value, static)
        finalize_layerwise_reload(layer, None)
        assert (layer.weight == value).all()
        assert (layer.weight_scale == value / 128).all()
        if static:
            assert layer.input_scale == value / 64
