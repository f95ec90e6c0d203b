# SPDX-License-Identifier: Apache-2.0
"""The fused MoE with every choice of tiles for ROCm, of odd shapes: run by
test_compiled_kernels.py in the machine. In other places it is not collected."""

from dataclasses import replace

import pytest
import torch
from vllm.model_executor.layers.fused_moe.experts.quark_int8.tensors import shape_of
from vllm.model_executor.layers.fused_moe.experts.quark_int8.tiles import (
    _ROCM,
    Config,
    FewConfig,
    choose_config,
)

from tests.kernels.moe.test_int8_moe import (
    LIMIT,
    Case,
    Layer,
    check,
    make,
    reference,
    run,
)

# The last expert has pairs, one id is none, and with an expert map one is absent. The
# last tile of K is not full, but nearly, so that all of it counts; tiles of 16, 64 and
# 128 pairs are full and nearly empty.
CASES = {
    "few": Case(13, 240, 496, 2, 3),
    "few-top-8": Case(40, 48, 1040, 1, 8, bias=True),
    "16": Case(6, 240, 368, 16, 3, bias=True, ids=(0, 6, 5)),
    "64": Case(3, 240, 240, 105, 2, present=(2, 0), limit=LIMIT),
    "128": Case(2, 240, 368, 170, 2, bias=True, limit=LIMIT),
}
BLOCKS = {"16": 16, "64": 64, "128": 128}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def config_of(layer: Layer) -> Config | FewConfig:
    return choose_config("rocm", shape_of(layer.experts, layer.routing))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_tiles(name: str, dtype: str) -> None:
    case = replace(CASES[name], dtype=DTYPES[dtype])
    layer = make(case)
    config = config_of(layer)
    if name in BLOCKS:
        assert isinstance(config, Config) and config.block_size_m == BLOCKS[name]
    else:
        assert isinstance(config, FewConfig)
    known = layer.routing.topk_ids < case.num_experts
    routing = replace(
        layer.routing,
        topk_ids=torch.where(known, layer.routing.topk_ids, 0),
        topk_weights=torch.where(known, layer.routing.topk_weights, 0.0),
    )
    check(run(layer, config), reference(replace(layer, routing=routing), case))


def test_every_choice_is_among_them() -> None:
    assert {config.block_size_m for _, config in _ROCM} == set(BLOCKS.values())
