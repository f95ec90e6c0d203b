# SPDX-License-Identifier: Apache-2.0
"""A Step-3.5 really built: the exclude list reaches the layers that vLLM fuses."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.distributed import get_ep_group
from vllm.distributed.eplb import eplb_state
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.quark.quark import (
    QuarkConfig,
    QuarkLinearMethod,
)
from vllm.model_executor.layers.quantization.quark.quark_moe import (
    QuarkW8A8Int8MoEMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
)
from vllm.model_executor.model_loader.utils import initialize_model

from tests.moe_layers import experts_of, plain_name
from tests.quantization.utils import poison, random_int8, random_scales

HIDDEN = 32
NUM_EXPERTS = 4
WIDTH = 16
HEAD_SIZE = 32  # the least that ROCm attends to
# Layer 0 is dense; layer 1 holds routed experts and a shared one.
DENSE, MOE = "model.layers.0", "model.layers.1"
SHARED_EXPERT = tuple(
    f"{MOE}.share_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")
)
ATTENTION = tuple(f"{MOE}.self_attn.{name}_proj" for name in "qkv")
NEEDS_0003 = pytest.mark.needs_patch("0003")
# The model shows its layers to EPLB, and their quantization lets them be moved.
EPLB = [pytest.mark.needs_patch("0015"), pytest.mark.needs_patch("0016")]


def eplb(test: Any) -> Any:
    for mark in EPLB:
        test = mark(test)
    return test


CONFIG: dict[str, Any] = {
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "torch_dtype": "bfloat16",
    "vocab_size": 64,
    "tie_word_embeddings": False,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "max_seq_len": 64,
    "num_attention_heads": 4,
    "num_attention_groups": 2,
    "head_dim": HEAD_SIZE,
    "layer_types": ["full_attention", "full_attention"],
    "rope_theta": [10000.0, 10000.0],
    "intermediate_size": WIDTH,
    "use_moe": True,
    "moe_layers_enum": "1",
    "moe_num_experts": NUM_EXPERTS,
    "moe_top_k": 2,
    "moe_intermediate_size": WIDTH,
    "share_expert_dim": WIDTH,
    "moe_router_activation": "sigmoid",
    "use_moe_router_bias": True,
    "need_fp32_gate": True,
    "norm_expert_weight": True,
}


@pytest.fixture
def build(device: torch.device, tmp_path: Path, quark_dict):
    """Build the model from a checkpoint's config.json, as the engine does."""

    def from_export(
        *exclude: str, num_redundant_experts: int = 0
    ) -> tuple[nn.Module, QuarkConfig]:
        quark = quark_dict(exclude=("lm_head", f"{MOE}.moe.gate", *exclude))
        config = CONFIG | {"quantization_config": quark}
        (tmp_path / "config.json").write_text(json.dumps(config))
        vllm_config = VllmConfig(
            model_config=ModelConfig(
                model=str(tmp_path), skip_tokenizer_init=True, dtype="bfloat16"
            ),
            load_config=LoadConfig(load_format="dummy"),
        )
        # EPLB as the engine sets it up, which it does on GPUs alone.
        parallel = vllm_config.parallel_config
        parallel.enable_eplb = num_redundant_experts > 0
        parallel.eplb_config.num_redundant_experts = num_redundant_experts
        return initialize_model(vllm_config), vllm_config.quant_config

    return from_export


def methods(model: nn.Module) -> dict[str, type]:
    """Layer name -> class of its quantization method."""
    return {
        plain_name(name): type(layer.quant_method)
        for name, layer in model.named_modules()
        if hasattr(layer, "quant_method")
    }


@NEEDS_0003
def test_mapping_and_renamed_exclude_list_reach_the_config(build):
    model, config = build(*SHARED_EXPERT)
    assert config.packed_modules_mapping is type(model).packed_modules_mapping
    assert config.packed_modules_mapping == {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    renamed = [name.replace(".share", ".moe.share") for name in SHARED_EXPERT]
    assert set(renamed) < set(config.quant_config["exclude"])


@NEEDS_0003
def test_excluded_shared_expert_is_not_quantized(build):
    model, _ = build(*SHARED_EXPERT)
    found = methods(model)
    assert found[f"{MOE}.moe.share_expert.gate_up_proj"] is UnquantizedLinearMethod
    assert found[f"{MOE}.moe.share_expert.down_proj"] is UnquantizedLinearMethod
    assert found[f"{MOE}.moe.experts"] is QuarkW8A8Int8MoEMethod
    for layer in (DENSE, MOE):
        assert found[f"{layer}.self_attn.qkv_proj"] is QuarkLinearMethod
        assert found[f"{layer}.self_attn.o_proj"] is QuarkLinearMethod
    for name in ("gate_up_proj", "down_proj"):
        assert found[f"{DENSE}.mlp.{name}"] is QuarkLinearMethod
    # Which of the two, an excluded embedding is told by the release.
    assert found["lm_head"] in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


def test_everything_else_is_quantized_by_default(build):
    model, _ = build()
    found = methods(model)
    for name in ("gate_up_proj", "down_proj"):
        assert found[f"{MOE}.moe.share_expert.{name}"] is QuarkLinearMethod
    assert found[f"{MOE}.self_attn.qkv_proj"] is QuarkLinearMethod


@NEEDS_0003
def test_excluded_attention_is_not_quantized(build):
    model, _ = build(*ATTENTION)
    found = methods(model)
    assert found[f"{MOE}.self_attn.qkv_proj"] is UnquantizedLinearMethod
    assert found[f"{DENSE}.self_attn.qkv_proj"] is QuarkLinearMethod


@NEEDS_0003
@pytest.mark.parametrize(
    "excluded",
    [ATTENTION[:1], ATTENTION[1:], SHARED_EXPERT[:1], SHARED_EXPERT[1:]],
    ids=["q", "k and v", "gate", "up and down"],
)
def test_half_excluded_is_an_error_that_names_the_shards(build, excluded):
    with pytest.raises(ValueError, match=r"_proj.*_proj.*layers\.1\."):
        build(*excluded)


@eplb
def test_eplb_finds_every_layer_of_experts(build, monkeypatch):
    """A layer that it does not find refuses its first prompt."""
    monkeypatch.setattr(eplb_state, "get_eplb_group", get_ep_group)
    model, _ = build(num_redundant_experts=2)
    vllm_config = model.model.vllm_config
    device = next(model.parameters()).device
    vllm_config.parallel_config.eplb_config.communicator = "torch_gloo"
    state = eplb_state.EplbState(vllm_config.parallel_config, device)
    state.add_model(model, vllm_config.model_config)
    routers = [each.router for each in model.modules() if hasattr(each, "router")]
    assert routers
    for router in routers:
        router._validate_eplb_state()


@pytest.fixture
def experts(rng) -> dict[str, Tensor]:
    """Routed experts by checkpoint name: int8 [E, N, K], float32 scales [E, N]."""
    tensors: dict[str, Tensor] = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        rows, columns = (HIDDEN, WIDTH) if name == "down_proj" else (WIDTH, HIDDEN)
        weight = random_int8(NUM_EXPERTS, rows, columns, rng=rng)
        scale = random_scales(NUM_EXPERTS, rows, rng=rng)
        tensors |= {f"{name}.weight": weight, f"{name}.weight_scale": scale}
    return tensors


@pytest.fixture
def shared_expert(rng) -> dict[str, Tensor]:
    """The shared expert in bfloat16, by checkpoint name."""
    shapes = [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    return {
        f"{name}.weight": torch.randn(shape, generator=rng, device="cpu").bfloat16()
        for name, shape in zip(SHARED_EXPERT, shapes, strict=True)
    }


def three_keys(experts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in experts.items():
        yield f"{MOE}.moe.{name}", tensor


def one_by_one(experts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in experts.items():
        for expert_id, expert in enumerate(tensor):
            yield f"{MOE}.moe.experts.{expert_id}.{name}", expert


@NEEDS_0003
def test_shared_expert_loads_as_it_is(build, shared_expert):
    """Taken for INT8, its bfloat16 weights would be cast, silently."""
    model, _ = build(*SHARED_EXPERT)
    poison(model)
    model.load_weights(shared_expert.items())

    gate, up, down = shared_expert.values()
    loaded = model.get_submodule(f"{MOE}.moe.share_expert")
    assert torch.equal(loaded.gate_up_proj.weight.data.cpu(), torch.cat([gate, up]))
    assert torch.equal(loaded.down_proj.weight.data.cpu(), down)


@pytest.mark.parametrize("num_redundant_experts", [0, pytest.param(6, marks=EPLB)])
@pytest.mark.parametrize("layout", [three_keys, one_by_one])
def test_routed_experts_load(build, experts, layout, num_redundant_experts):
    """In both layouts, and into the copies that EPLB asks for, the first ones twice."""
    model, _ = build(*SHARED_EXPERT, num_redundant_experts=num_redundant_experts)
    poison(model)
    model.load_weights(layout(experts))
    copies = [*range(NUM_EXPERTS), 0, 1, 2, 3, 0, 1][
        : NUM_EXPERTS + num_redundant_experts
    ]
    experts = {name: tensor[copies] for name, tensor in experts.items()}

    loaded = experts_of(model.get_submodule(f"{MOE}.moe.experts"))
    for suffix in ("weight", "weight_scale"):
        gate, up, down = (experts[f"{p}_proj.{suffix}"] for p in ("gate", "up", "down"))
        w13, w2 = (getattr(loaded, f"{w}_{suffix}").data.cpu() for w in ("w13", "w2"))
        assert torch.equal(w13, torch.cat([gate, up], dim=1))
        assert torch.equal(w2, down)
