# SPDX-License-Identifier: Apache-2.0
"""Quark's rules: which entry of a config names which module."""

import time
from typing import Any

import pytest
from vllm.model_executor.layers.quantization.quark.quark_check.rules import (
    Entries,
    experts_excluded,
    experts_override,
    has_int8,
    layer_config,
    matches,
    mixed_shards,
)

EXPERTS = "model.layers.3.moe.experts"
NUM_EXPERTS = 3
SPECIAL = {"weight": {"dtype": "int8", "qscheme": "per_tensor"}}
GLOBAL = {"weight": {"dtype": "int8", "qscheme": "per_channel"}}


@pytest.mark.parametrize(
    "name, entry, expected",
    [
        ("model.layers.2.share_expert.up_proj", "*share_expert*", True),
        ("model.layers.2.share_expert.up_proj", "*.share_expert.*", True),
        ("model.layers.2.shared_expert.up_proj", "*.share_expert.*", False),
        ("model.layers.2.moe.gate", "*.moe.gate", True),
        ("model.layers.2.moe.gate_proj", "*.moe.gate", False),
        ("model.layers.2.mlp.up_proj", "model.layers.?.mlp.*", True),
        ("model.layers.12.mlp.up_proj", "model.layers.?.mlp.*", False),
        ("model.layers.2.mlp.up_proj", "model.layers.[0-2].mlp.*", True),
        ("model.layers.3.mlp.up_proj", "model.layers.[0-2].mlp.*", False),
        # Quark compares case; so do file names on Linux.
        ("model.layers.2.MLP.up_proj", "*.mlp.*", False),
        ("a\nb.mlp.up_proj", "*.mlp.*", True),
        ("lm_head", "re:lm_.*", True),
    ],
)
def test_matches(name, entry, expected):
    assert matches(name, entry) is expected


def test_bad_expression_is_named():
    with pytest.raises(ValueError, match=r"'re:\(' .*config\.json"):
        matches("lm_head", "re:(")


def test_full_name_comes_before_patterns():
    entries = Entries.of(["*.b", "a.b"])
    assert entries.match("a.b") == "a.b"
    assert entries.match("c.b") == "*.b"
    assert entries.match("c.d") is None
    assert Entries.of(None).match("a") is None


def every_expert(*projections: str) -> list[str]:
    return [f"{EXPERTS}.{e}.{p}" for e in range(NUM_EXPERTS) for p in projections]


ALL = every_expert("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    "exclude, expected",
    [
        ([], False),
        (["lm_head", "*.mlp.gate_proj", "model.layers.4.moe.experts"], False),
        (ALL, True),
        (every_expert("w1", "w2", "w3"), True),
        ([EXPERTS], True),
        (["*.experts.*"], True),
        (["re:.*experts"], True),
        ([f"model.layers.3.moe.{p}_proj" for p in ("gate", "up", "down")], True),
        # The names of a dense layer's shards are not those of stacked experts.
        (["*.moe.gate_proj"], False),
    ],
)
def test_excluded_experts(exclude, expected):
    assert experts_excluded(EXPERTS, NUM_EXPERTS, exclude) is expected


@pytest.mark.parametrize(
    "exclude", [ALL[:-1], ["*.experts.1.*"], ["*.down_proj"], every_expert("w1")]
)
def test_some_excluded_experts_are_an_error_that_names_them(exclude):
    with pytest.raises(ValueError, match="expected all or none") as error:
        experts_excluded(EXPERTS, NUM_EXPERTS, exclude)
    assert EXPERTS in str(error.value) and "but not" in str(error.value)


def config(by_name: dict[str, Any], by_type: dict[str, Any] | None = None) -> dict:
    return {
        "global_quant_config": GLOBAL,
        "layer_quant_config": by_name,
        "layer_type_quant_config": by_type or {},
    }


@pytest.mark.parametrize(
    "by_name, by_type, expected",
    [
        ({}, {}, GLOBAL),
        ({}, None, GLOBAL),
        ({"*.mlp.*": SPECIAL}, {}, SPECIAL),
        ({"model.layers.0.mlp.up_proj": SPECIAL}, {}, SPECIAL),
        ({"model.layers.0.mlp.up_proj_2": SPECIAL}, {}, GLOBAL),
        ({}, {"Linear": SPECIAL}, SPECIAL),
        ({}, {"Conv2d": SPECIAL}, GLOBAL),
        ({"*.mlp.*": SPECIAL}, {"Linear": GLOBAL}, SPECIAL),
        ({"*": GLOBAL, "model.layers.0.mlp.up_proj": SPECIAL}, {}, SPECIAL),
    ],
)
def test_layer_config(by_name, by_type, expected):
    found = layer_config("model.layers.0.mlp.up_proj", None, config(by_name, by_type))
    assert found is expected


@pytest.mark.parametrize(
    "by_name, expected",
    [
        ({}, GLOBAL),
        ({"*.experts.*": SPECIAL}, SPECIAL),
        (dict.fromkeys(ALL, SPECIAL), SPECIAL),
        ({EXPERTS: SPECIAL}, SPECIAL),
        (
            dict.fromkeys(
                ["*.moe.gate_proj", "*.moe.up_proj", "*.moe.down_proj"], SPECIAL
            ),
            SPECIAL,
        ),
        ({"*.moe.gate_proj": SPECIAL}, GLOBAL),
        ({"*.mlp.*": SPECIAL}, GLOBAL),
    ],
)
def test_config_of_experts(by_name, expected):
    assert layer_config(EXPERTS, NUM_EXPERTS, config(by_name)) is expected


def test_experts_that_differ_are_an_error_that_names_two():
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj and .*experts\.2\."):
        experts_override(EXPERTS, NUM_EXPERTS, config({"*.experts.2.*": SPECIAL}))


def test_mixed_shards_names_both_sides():
    error = mixed_shards("a.qkv_proj", {"a.q_proj": True, "a.k_proj": False})
    assert "excludes a.q_proj but not a.k_proj" in str(error)
    assert "a.qkv_proj" in str(error)


@pytest.mark.parametrize(
    "quark, expected",
    [
        ({}, False),
        ({"global_quant_config": None}, False),
        ({"global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}, False),
        ({"global_quant_config": {"weight": [{"dtype": "int8"}]}}, False),
        ({"global_quant_config": GLOBAL}, True),
        ({"layer_quant_config": {"*": GLOBAL}}, True),
        ({"layer_type_quant_config": {"Linear": GLOBAL}}, True),
        ({"layer_quant_config": ["*"]}, False),
    ],
)
def test_has_int8(quark, expected):
    assert has_int8(quark) is expected


def test_expression_that_does_not_end_is_named():
    """vLLM's own library of expressions gives up after a second."""
    pytest.importorskip("regex", reason="only it has a limit; vLLM brings it")
    started = time.process_time()
    with pytest.raises(ValueError, match=r"entry 're:\(a\|aa\)\+\$' .* takes over 1 s"):
        matches("a" * 60 + "!", "re:(a|aa)+$")
    assert time.process_time() - started < 5
