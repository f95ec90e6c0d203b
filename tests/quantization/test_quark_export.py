# SPDX-License-Identifier: Apache-2.0
"""What the files of an export hold for a layer, asked by vLLM's names."""

import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from vllm.model_executor.layers.quantization.quark.quark_check.checkpoint import (
    TensorInfo,
)
from vllm.model_executor.layers.quantization.quark.quark_check.config import (
    number_problems,
)
from vllm.model_executor.layers.quantization.quark.quark_check.export import Export
from vllm.model_executor.models.utils import WeightsMapper

FILE = Path("model.safetensors")


def tensors(*entries: tuple[str, str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, dtype, shape, FILE, 0, 0)
        for name, dtype, shape in entries
    }


def int8(module: str, *shape: int) -> list[tuple[str, str, tuple[int, ...]]]:
    return [
        (f"{module}.weight", "I8", shape),
        (f"{module}.weight_scale", "F32", shape[:-1]),
    ]


def ids(export: Export) -> list[str]:
    return [problem.id for problem in export.problems]


@pytest.fixture
def config(quark_dict) -> dict[str, Any]:
    return quark_dict()


def test_the_files_decide(config):
    """Not exclude, which names the wrong one of the two."""
    config["exclude"] = ["a.left"]
    held = tensors(*int8("a.left", 4, 8), ("a.right.weight", "BF16", (4, 8)))
    export = Export(held, config)
    right = export.linear("a.right", {})
    assert right is not None and right.config is None
    assert ids(export) == ["float-not-excluded"]
    export.linear("a.left", {})
    assert ids(export) == ["float-not-excluded", "int8-excluded"]
    assert export.linear("a.other", {}) is None


def test_names_are_followed_through_a_mapper(config):
    export = Export(tensors(*int8("model.layers.0.up_proj", 4, 8)), config)
    export.rename(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    layer = export.linear("language_model.model.layers.0.up_proj", {})
    assert layer is not None and layer.config is config["global_quant_config"]
    assert layer.weights[0].module == "model.layers.0.up_proj"


@pytest.mark.parametrize(
    "held",
    [
        int8("moe.experts.0.w1", 4, 8) + int8("moe.experts.1.w1", 4, 8),
        int8("moe.gate_proj", 2, 4, 8),
        [
            ("moe.experts.gate_up_proj", "I8", (2, 8, 8)),
            ("moe.experts.gate_up_proj_weight_scale", "F32", (2, 8)),
        ],
    ],
    ids=["one by one", "stacked beside", "stacked in one tensor"],
)
def test_experts_in_every_layout(held, config):
    config["layer_quant_config"] = {"moe.experts*": {"weight": {"dtype": "int8"}}}
    others = [("moe.gate.weight", "BF16", (2, 8)), *int8("moe.shared.w1", 4, 8)]
    layer = Export(tensors(*held, *others), config).experts("moe.experts")
    assert layer is not None
    assert {stored.weight.name for stored in layer.weights} == {
        name for name, *_ in held if "scale" not in name
    }
    assert all("weight_scale" in stored.companions for stored in layer.weights)
    assert layer.config == config["layer_quant_config"]["moe.experts*"]


def test_a_layer_that_goes_by_another_name(config):
    """MiniMax-M2 asks for `mlp` and stores `block_sparse_moe`, of every layer."""
    stored = "model.layers.{}.block_sparse_moe"
    held = [
        *int8(f"{stored.format(0)}.experts.0.w1", 4, 8),
        (f"{stored.format(1)}.experts.0.w1.weight", "BF16", (4, 8)),
        (f"{stored.format(1)}.gate.weight", "BF16", (2, 8)),
        *int8("model.layers.1.self_attn.o_proj", 4, 8),
    ]
    export = Export(tensors(*held), config)
    first, second = (export.experts(f"model.layers.{n}.mlp.experts") for n in (0, 1))
    assert first is not None and first.config is config["global_quant_config"]
    assert second is not None and second.config is None
    gate = export.linear("model.layers.1.mlp.gate", {})
    assert gate is not None and gate.config is None
    assert export.linear("model.layers.1.mlp.up_proj", {}) is None
    assert export.experts("model.layers.2.mlp.experts") is None


def test_two_layers_that_could_be_meant_are_none(config):
    held = [(f"a.{x}.gate.weight", "BF16", (2, 8)) for x in ("left", "right")]
    assert Export(tensors(*held), config).linear("a.mlp.gate", {}) is None


@pytest.mark.parametrize("dtype", ["BF16", "BOOL"])
def test_experts_of_two_kinds_differ(dtype, config):
    held = (*int8("e.experts.0.w1", 4, 8), ("e.experts.1.w1.weight", dtype, (4, 8)))
    export = Export(tensors(*held), config)
    export.experts("e.experts")
    assert ids(export)[0] == "experts-differ"


def test_a_layer_without_a_scheme_is_float(config):
    """Quark leaves it so: the files hold floats, and nothing is odd about it."""
    config["layer_quant_config"] = {"*o_proj": {"weight": None}}
    export = Export(tensors(("a.o_proj.weight", "BF16", (4, 8))), config)
    layer = export.linear("a.o_proj", {})
    assert layer is not None and layer.config is None
    assert not export.problems


@pytest.mark.parametrize("is_same", [True, False])
def test_override_that_repeats_the_global_scheme(is_same, config):
    """In other words, as of another observer; a fused layer has one scheme."""
    part = config["global_quant_config"]
    weight = {**part["weight"], "observer_cls": "PerChannelMinMaxObserver"}
    del weight["is_dynamic"]
    weight |= {} if is_same else {"qscheme": "per_tensor"}
    config["layer_quant_config"] = {"*k_proj": {**part, "weight": weight}}
    held = tensors(*(each for x in "qkv" for each in int8(f"a.{x}_proj", 4, 8)))
    export = Export(held, config)
    layer = export.linear("a.qkv_proj", {"qkv_proj": ["q_proj", "k_proj", "v_proj"]})
    assert layer is not None and len(layer.weights) == 3
    assert ids(export) == ([] if is_same else ["shards-differ"])


def test_a_million_experts_cost_what_their_headers_cost(config):
    """Tensors without an element claim them; exclude names experts in every way."""
    held: list[tuple[str, str, tuple[int, ...]]]
    held = [("m.gate_proj.weight", "I8", (10**6, 0, 8))]
    held += [("m.gate_proj.weight_scale", "F32", (10**6, 0))]
    config["exclude"] = ["*lm_head", "m.experts.5.gate_proj", "re:.*router.*"]
    tracemalloc.start()
    started = time.process_time()
    export = Export(tensors(*held), config)
    export.experts("m.experts")
    list(export.exclude_without_module())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.process_time() - started < 1
    assert peak < 1 << 20


def test_number_of_many_digits_is_named():
    settings = {"text_config": {"num_experts": 10**400}, "hidden_size": 8, "a": True}
    [problem] = number_problems(settings)
    assert "config.json, text_config.num_experts: expected a number of 64 bits" in str(
        problem.error
    )
