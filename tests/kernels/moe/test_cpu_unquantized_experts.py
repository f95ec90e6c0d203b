# SPDX-License-Identifier: Apache-2.0
"""CpuUnquantizedExperts, where a release's oracle chooses them, against float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from tests.kernels.moe.unquantized_reference import (
    EXPERTS,
    NUM_EXPERTS,
    Batch,
    Case,
    Weights,
    assert_right,
    in_float64,
    make_batch,
    make_weights,
    route,
)
from tests.moe_layers import make_experts

if not current_platform.is_cpu():
    pytest.skip("needs a vLLM built for CPUs", allow_module_level=True)
quark_unquantized_cpu: Any = pytest.importorskip(
    "vllm.model_executor.layers.fused_moe.experts.quark_unquantized_cpu",
    reason="needs a release whose oracle chooses unquantized experts on a CPU",
    exc_type=ImportError,
)
CpuUnquantizedExperts = quark_unquantized_cpu.CpuUnquantizedExperts

CLIPPED = Case(swiglu_limit=1.0)
# With the scores' weights: the reference's router is not asked for more.
APPLIED = {
    name: case
    for name, case in EXPERTS.items()
    if not case.num_zero and name not in ("on-input", "on-input-bias")
} | {
    "clipped": CLIPPED,
    "clipped-map": replace(EXPERTS["expert-map"], swiglu_limit=1.0),
}
MAPPED = [name for name, case in APPLIED.items() if case.expert_map is not None]


def make_config(case: Case) -> tuple[Any, Any]:
    """The layer's FusedMoEConfig, on one of two ranks where there is a map; and the
    method that the model's layer has without it."""
    layer = make_experts(
        num_experts=NUM_EXPERTS,
        top_k=case.top_k,
        hidden_size=case.hidden,
        intermediate_size=case.width,
        params_dtype=case.dtype,
        activation=case.activation,
        has_bias=case.has_bias,
        swiglu_limit=case.swiglu_limit,
        prefix="model.layers.0.mlp.experts",
    )
    config = layer.moe_config
    if case.expert_map is not None:
        parallel = replace(config.moe_parallel_config, use_ep=True, ep_size=2)
        config = replace(
            config, moe_parallel_config=parallel, num_local_experts=case.num_local
        )
    return config, layer


def is_chosen(config: Any) -> bool:
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    return (
        unquantized.select_unquantized_moe_backend(config)[1] is CpuUnquantizedExperts
    )


def apply(
    case: Case, config: Any, layer: Any, weights: Weights, batch: Batch, ids: Tensor
) -> Tensor:
    """What the class writes over an output that was poisoned."""
    held = list(range(NUM_EXPERTS))
    if case.expert_map is not None:
        held = [case.expert_map.index(local) for local in range(case.num_local)]
    for name in ("w13_bias", "w2_bias"):
        if (values := getattr(weights, name)) is not None:
            setattr(layer, name, torch.nn.Parameter(values[held], requires_grad=False))
    quant_config = layer.quant_method.get_fused_moe_quant_config(layer)
    all_weights = route(case, weights, batch)[0]
    valid = (ids >= 0) & (ids < NUM_EXPERTS)
    topk_weights = all_weights.gather(1, ids.where(valid, 0).long()).float()
    out = torch.full_like(batch.x, torch.nan)
    expert_map = None if case.expert_map is None else torch.tensor(case.expert_map)
    experts = CpuUnquantizedExperts(config, quant_config)
    experts.apply(
        out,
        batch.x,
        weights.w13[held],
        weights.w2[held],
        topk_weights,
        ids,
        config.activation,
        NUM_EXPERTS,
        expert_map,
        None,
        None,
        torch.empty(0),
        torch.empty(0),
        None,
        False,
    )
    return out


@pytest.fixture(autouse=True)
def _context(vllm_config: VllmConfig) -> None:
    """Every layer here is built under a current VllmConfig."""
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", APPLIED)
def test_matches_float64(name: str, rng: torch.Generator) -> None:
    case = APPLIED[name]
    weights, batch = make_weights(case, rng), make_batch(case, rng)
    ids = torch.tensor(route(case, weights, batch)[1], dtype=torch.int32)
    out = apply(case, *make_config(case), weights, batch, ids)
    assert_right(out, in_float64(case, weights, batch))


@pytest.mark.parametrize("name", ["hidden-80", "expert-map"])
def test_no_tokens(name: str, rng: torch.Generator) -> None:
    case = APPLIED[name]
    weights, batch = make_weights(case, rng), make_batch(case, rng, num_tokens=0)
    ids = torch.empty(0, case.top_k, dtype=torch.int32)
    out = apply(case, *make_config(case), weights, batch, ids)
    assert out.shape == (0, case.hidden)


@pytest.mark.parametrize("name", ["hidden-80", "expert-map"])
def test_ids_that_are_no_expert_add_nothing(name: str, rng: torch.Generator) -> None:
    """-1 is not the last expert, and nothing beyond the last is read."""
    case = APPLIED[name]
    weights, batch = make_weights(case, rng), make_batch(case, rng)
    ids = torch.tensor(route(case, weights, batch)[1], dtype=torch.int32)
    wrong = torch.rand(ids.shape, generator=rng, device="cpu") < 0.4
    wrong[3] = True
    outside = torch.tensor([-1, -8, NUM_EXPERTS, 2**30], dtype=torch.int32)
    found = ids.masked_scatter(wrong, outside.repeat(ids.numel()))
    config, layer = make_config(case)
    out = apply(case, config, layer, weights, batch, found)
    assert not out[3].any()

    # The whole, less what the wrong slots would have added each by itself.
    whole = apply(case, config, layer, weights, batch, ids).double()
    for slot in range(case.top_k):
        alone = torch.full_like(ids, -1)
        alone[:, slot] = ids[:, slot]
        part = apply(case, config, layer, weights, batch, alone).double()
        whole -= part.where(wrong[:, slot, None], 0.0)
    assert_right(out, whole)


@pytest.mark.parametrize("name", [*MAPPED, "clipped"])
def test_serves_where_upstream_would_be_wrong(name: str) -> None:
    """Upstream's kernels say that they support a map and a limit, and read neither."""
    assert is_chosen(make_config(APPLIED[name])[0])


@pytest.mark.parametrize("width", [32, 64])
def test_upstream_keeps_what_it_applies_right(width: int) -> None:
    assert not is_chosen(make_config(Case(width=width))[0])


def test_step3p5_is_served() -> None:
    assert is_chosen(make_config(Case(activation="swiglustep"))[0])


def test_a_limit_that_nobody_clips_at_is_not_supported() -> None:
    config = make_config(Case(activation="swigluoai", swiglu_limit=3.0))[0]
    from vllm.model_executor.layers.fused_moe import modular_kernel

    supported, reason = CpuUnquantizedExperts.is_supported_config(
        CpuUnquantizedExperts,
        replace(
            config, moe_parallel_config=replace(config.moe_parallel_config, use_ep=True)
        ),
        None,
        None,
        modular_kernel.FusedMoEActivationFormat.Standard,
    )
    assert not supported and "swiglu_limit of 3.0" in str(reason)
