# SPDX-License-Identifier: Apache-2.0
"""Which layers Quark's exclude list leaves alone, fused layers above all."""

from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.quark.quark import (
    QuarkConfig,
    QuarkKVCacheMethod,
    QuarkLinearMethod,
)
from vllm.model_executor.layers.quantization.quark.utils import should_ignore_layer
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.utils import configure_quant_config
from vllm.model_executor.models.step3p5 import Step3p5ForCausalLM

from tests.moe_layers import make_experts

FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
LAYER = "model.layers.3"
NEEDS_0003 = pytest.mark.needs_patch("0003")
AS_QUARK = pytest.mark.needs_patch("0008")


def names(parent: str, fused: str) -> list[str]:
    return [f"{parent}.{shard}" for shard in FUSED[fused]]


@pytest.mark.parametrize(
    "name, exclude, ignored",
    [
        ("lm_head", ["lm_head"], True),
        ("model.layers.0.mlp.down_proj", ["model.layers.0.mlp.down_proj"], True),
        ("model.layers.0.mlp.down_proj", [], False),
        ("model.layers.0.mlp.down_proj", ["model.layers.0.mlp.up_proj"], False),
        # A name that begins or ends like another is another name.
        ("model.layers.1.mlp.down_proj", ["model.layers.11.mlp.down_proj"], False),
        ("model.layers.11.mlp.down_proj", ["model.layers.1.mlp.down_proj"], False),
        ("model.layers.1.mlp.down_proj", ["model.layers.1.mlp"], False),
        ("model.layers.1.mlp", ["model.layers.1.mlp.down_proj"], False),
        ("model.layers.1.moe.gate", ["model.layers.1.moe.gate_proj"], False),
        ("model.layers.1.moe.gate", ["layers.1.moe.gate"], False),
        # A pattern matches from the name's beginning and may end before it ends.
        ("model.layers.3.mlp.down_proj", [r"re:.*\.mlp\..*"], True),
        ("model.layers.3.mlp.down_proj", [r"re:model\.layers\.3\."], True),
        ("model.layers.13.mlp.down_proj", [r"re:model\.layers\.3\."], False),
        ("model.layers.3.mlp.down_proj", [r"re:mlp"], False),
        ("model.layers.3.mlp.down_proj", [r"re:.*\.down_proj$"], True),
        ("model.layers.3.mlp.down_proj_2", [r"re:.*\.down_proj$"], False),
        # Without "re:" it is a name, whatever it holds.
        ("model.layers.3.mlp.down_proj", [r"model.layers..*"], False),
        (None, ["lm_head"], False),
    ],
)
def test_one_layer(name, exclude, ignored):
    assert should_ignore_layer(name, exclude, FUSED) is ignored


@AS_QUARK
@pytest.mark.parametrize(
    "name, exclude",
    [
        # amd-quark's own defaults are globs.
        ("lm_head", "*lm_head"),
        ("model.layers.3.mlp.gate", "*.gate"),
        ("model.layers.3.mlp.down_proj", "model.layers.?.mlp.*"),
        ("model.layers.3.block.qkv_proj", "*.block.[qkv]_proj"),
    ],
)
def test_globs(name, exclude):
    assert should_ignore_layer(name, [exclude], FUSED) is True
    assert should_ignore_layer(f"{name}_2", [exclude], FUSED) is exclude.endswith("*")


@AS_QUARK
def test_a_name_comes_before_globs(vllm_config: VllmConfig, quark_dict):
    """Whatever their order in layer_quant_config."""
    config = quark_dict()
    per_tensor = quark_dict(weight="per_tensor")["global_quant_config"]
    config["layer_quant_config"] = {
        "*": config["global_quant_config"],
        f"{LAYER}.mlp.down_proj": per_tensor,
    }
    of = QuarkConfig.from_config(config)
    for name, scales in (("mlp.down_proj", 1), ("mlp.up_proj", 16)):
        layer = ColumnParallelLinear(
            32, 16, bias=False, quant_config=of, prefix=f"{LAYER}.{name}"
        )
        assert layer.weight_scale.numel() == scales


@AS_QUARK
def test_experts_that_are_excluded_one_by_one(vllm_config: VllmConfig, quark_dict):
    """As exports of nn.Linear modules name them; vLLM fuses them."""
    parts = ("gate_proj", "up_proj", "down_proj")
    excluded = [f"{LAYER}.moe.experts.{e}.{p}" for e in range(4) for p in parts]
    of = QuarkConfig.from_config(quark_dict(exclude=tuple(excluded)))
    layer = make_experts(4, 2, 64, 32, quant_config=of, prefix=f"{LAYER}.moe.experts")
    assert layer.w13_weight.dtype is torch.bfloat16


@AS_QUARK
def test_globs_mean_modules_of_the_checkpoint(vllm_config: VllmConfig, quark_dict):
    """Not the embedding, which takes no other method, nor the layer that vLLM keeps
    keys and values in."""
    exclude = ("*embed*", "*self_attn*")
    of = QuarkConfig.from_config(quark_dict(exclude=exclude))
    embedding = VocabParallelEmbedding(64, 32, quant_config=of, prefix="model.embed")
    assert isinstance(embedding.quant_method, UnquantizedEmbeddingMethod)
    attention = Attention.__new__(Attention)
    method = of.get_quant_method(attention, f"{LAYER}.self_attn.attn")
    assert isinstance(method, QuarkKVCacheMethod)


@pytest.mark.parametrize("fused", FUSED)
def test_fused_layer_with_all_or_no_shards_excluded(fused):
    name = f"model.layers.3.block.{fused}"
    others = names("model.layers.31.block", fused)
    shards = names("model.layers.3.block", fused)
    assert should_ignore_layer(name, shards + others, FUSED) is True
    assert should_ignore_layer(name, others, FUSED) is False
    pattern = [rf"re:.*\.({'|'.join(FUSED[fused])})"]
    assert should_ignore_layer(name, pattern, FUSED) is True


@pytest.mark.parametrize(
    "fused, excluded",
    [
        (fused, shards)
        for fused, all_shards in FUSED.items()
        for shards in (all_shards[:1], all_shards[1:], all_shards[-1:])
    ],
)
def test_fused_layer_with_some_shards_excluded_is_an_error(fused, excluded):
    """One that names the layer and its shards."""
    name = f"model.layers.3.block.{fused}"
    exclude = [f"model.layers.3.block.{shard}" for shard in excluded]
    with pytest.raises(ValueError) as error:
        should_ignore_layer(name, exclude, FUSED)
    for named in (name, *FUSED[fused]):
        assert named in str(error.value)


@pytest.mark.parametrize("fused", FUSED)
def test_shards_mean_nothing_without_the_mapping(fused):
    """Why a model class without `packed_modules_mapping` reads an export wrong."""
    shards = names("model.layers.3.block", fused)
    assert should_ignore_layer(f"model.layers.3.block.{fused}", shards) is False


@NEEDS_0003
def test_step3p5_maps_its_fused_modules():
    assert Step3p5ForCausalLM.packed_modules_mapping == FUSED


def step3p5_config(quark: dict[str, Any]) -> QuarkConfig:
    """Quark's configuration as the engine hands it to a Step-3.5."""
    config = QuarkConfig.from_config(quark)
    configure_quant_config(config, Step3p5ForCausalLM)
    return config


def step3p5_ignores(config: QuarkConfig, name: str) -> bool:
    exclude = config.quant_config["exclude"]
    return should_ignore_layer(name, exclude, config.packed_modules_mapping)


SHARED = (f"{LAYER}.share_expert.gate_proj", f"{LAYER}.share_expert.up_proj")


@pytest.mark.parametrize(
    "exclude, name, ignored",
    [
        pytest.param(
            SHARED,
            f"{LAYER}.moe.share_expert.gate_up_proj",
            True,
            marks=NEEDS_0003,
            id="gate_up",
        ),
        pytest.param(
            tuple(names(f"{LAYER}.self_attn", "qkv_proj")),
            f"{LAYER}.self_attn.qkv_proj",
            True,
            marks=NEEDS_0003,
            id="qkv",
        ),
        pytest.param(
            (r"re:.*\.share_expert\.(gate|up)_proj",),
            f"{LAYER}.moe.share_expert.gate_up_proj",
            True,
            marks=NEEDS_0003,
            id="pattern",
        ),
        pytest.param(
            (f"{LAYER}.share_expert.down_proj",),
            f"{LAYER}.moe.share_expert.down_proj",
            True,
            id="down",
        ),
        pytest.param(
            SHARED, "model.layers.31.moe.share_expert.gate_up_proj", False, id="layer"
        ),
        pytest.param(SHARED, f"{LAYER}.mlp.gate_up_proj", False, id="dense"),
        pytest.param(SHARED, f"{LAYER}.moe.experts", False, id="routed"),
    ],
)
def test_step3p5_names(exclude, name, ignored, quark_dict):
    """The export says share_expert.gate_proj, vLLM moe.share_expert.gate_up_proj."""
    config = step3p5_config(quark_dict(exclude=exclude))
    assert step3p5_ignores(config, name) is ignored


@NEEDS_0003
@pytest.mark.parametrize("excluded", SHARED)
def test_step3p5_half_excluded_is_an_error(excluded, quark_dict):
    config = step3p5_config(quark_dict(exclude=(excluded,)))
    with pytest.raises(ValueError, match="gate_proj.*up_proj"):
        step3p5_ignores(config, f"{LAYER}.moe.share_expert.gate_up_proj")


@pytest.mark.parametrize(
    "name, method",
    [
        pytest.param(
            f"{LAYER}.moe.share_expert.gate_up_proj",
            UnquantizedLinearMethod,
            marks=NEEDS_0003,
        ),
        (f"{LAYER}.mlp.gate_up_proj", QuarkLinearMethod),
    ],
)
def test_layers_get_their_method(name, method, vllm_config: VllmConfig, quark_dict):
    """An excluded layer keeps bfloat16 weights; the others take int8."""
    layer = MergedColumnParallelLinear(
        32,
        [16, 16],
        bias=False,
        quant_config=step3p5_config(quark_dict(exclude=SHARED)),
        prefix=name,
    )
    assert type(layer.quant_method) is method
    excluded = method is UnquantizedLinearMethod
    assert layer.weight.dtype is (torch.bfloat16 if excluded else torch.int8)


def test_a_router_is_excluded_by_its_own_name(vllm_config: VllmConfig, quark_dict):
    """`moe.gate` neither takes nor gives its fate to `moe.gate_proj`."""
    config = step3p5_config(quark_dict(exclude=(f"{LAYER}.moe.gate",)))
    for name, method in (
        (f"{LAYER}.moe.gate", UnquantizedLinearMethod),
        (f"{LAYER}.moe.gate_proj", QuarkLinearMethod),
    ):
        layer = ColumnParallelLinear(
            32, 16, bias=False, quant_config=config, prefix=name
        )
        assert type(layer.quant_method) is method
