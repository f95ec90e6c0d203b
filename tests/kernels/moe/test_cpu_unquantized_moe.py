# SPDX-License-Identifier: Apache-2.0
"""Unquantized experts on a CPU, routed by the layer's own router, against float64.

In float32 what is left to differ is the order of operations; a router takes float32
logits.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.platforms import current_platform

from tests.kernels.moe.unquantized_reference import (
    CASES,
    EXPERTS,
    NUM_EXPERTS,
    Batch,
    Case,
    Weights,
    act,
    assert_right,
    choose_custom,
    in_float64,
    make_batch,
    make_weights,
    route,
)
from tests.moe_layers import experts_of, make_moe

try:
    from vllm.model_executor.layers.fused_moe import cpu_fused_moe, cpu_unquantized_moe
except ImportError:
    cpu_fused_moe = cpu_unquantized_moe = None  # type: ignore[assignment]

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="needs a vLLM built for CPUs"
)
monolithic = pytest.mark.skipif(
    cpu_fused_moe is None,
    reason="this release's oracle chooses unquantized experts on a CPU, too: see "
    "test_cpu_unquantized_experts.py",
)

LAYER = "model.layers.0.mlp.experts"

# What the layer of a release with such an oracle does not do, or not so.
ORACLE_LACKS = {
    "deepseek-v4": "upstream's choice by sqrtsoftplus knows no 8 experts",
    "hashed": "upstream's choice by sqrtsoftplus knows no 8 experts",
    "on-input": "upstream weights the input of one expert a token alone",
    "on-input-bias": "upstream weights tokens, and leaves the bias as it is",
    "expert-map": "test_cpu_unquantized_experts.py asks with a map",
    "no-expert": "test_cpu_unquantized_experts.py asks with a map",
    "mapped-bias": "test_cpu_unquantized_experts.py asks with a map",
}


def build(case: Case, weights: Weights) -> Any:
    """The layer that a model would build, with these weights loaded."""
    grouped = {}
    if case.groups is not None:
        grouped = dict(
            zip(("num_expert_group", "topk_group"), case.groups, strict=True)
        )
    moe = make_moe(
        num_experts=NUM_EXPERTS,
        top_k=case.top_k,
        hidden_size=case.hidden,
        intermediate_size=case.width,
        params_dtype=case.dtype,
        renormalize=case.renormalize,
        use_grouped_topk=case.groups is not None,
        custom_routing_function=choose_custom if case.custom else None,
        scoring_func=case.scores,
        routed_scaling_factor=case.factor,
        swiglu_limit=case.swiglu_limit,
        e_score_correction_bias=weights.correction,
        apply_router_weight_on_input=case.on_input,
        activation=case.activation,
        has_bias=case.has_bias,
        zero_expert_type="identity" if case.num_zero else None,
        hash_indices_table=weights.table,
        prefix=LAYER,
        **grouped,
    )
    layer = experts_of(moe)
    assert isinstance(layer.quant_method, UnquantizedFusedMoEMethod)
    held = list(range(NUM_EXPERTS))
    if case.expert_map is not None:
        layer._expert_map = torch.tensor(case.expert_map, dtype=torch.int32)
        layer.local_num_experts = case.num_local
        held = [case.expert_map.index(local) for local in range(case.num_local)]
    for name in ("w13_weight", "w2_weight", "w13_bias", "w2_bias"):
        if hasattr(layer, name):
            values = getattr(weights, name.removesuffix("_weight"))[held]
            setattr(layer, name, torch.nn.Parameter(values, requires_grad=False))
    layer.quant_method.process_weights_after_loading(layer)
    return moe


def run(moe: Any, batch: Batch) -> Tensor:
    """What the model's runner makes of a batch, which it may overwrite."""
    runner = getattr(moe, "runner", moe)
    # Which holds the experts, or is given them.
    given = () if hasattr(runner, "routed_experts") else (moe,)
    _, out = runner._apply_quant_method(
        *given, batch.x.clone(), batch.logits.clone(), None, batch.input_ids
    )
    return runner._maybe_add_zero_expert_output(out)


@pytest.fixture(autouse=True)
def _context(vllm_config: VllmConfig) -> None:
    """Every layer here is built under a current VllmConfig."""
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_layer_matches_float64(name: str, rng: torch.Generator) -> None:
    if cpu_fused_moe is None and name in ORACLE_LACKS:
        pytest.skip(ORACLE_LACKS[name])
    case = CASES[name]
    weights, batch = make_weights(case, rng), make_batch(case, rng)
    out = run(build(case, weights), batch)
    assert out.dtype == case.dtype
    assert_right(out, in_float64(case, weights, batch))


@pytest.mark.parametrize("name", ["ernie-4.5", "step-3.5", "gpt-oss", "width-176"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.003)], ids=str
)
def test_short_floats(
    name: str, dtype: torch.dtype, tolerance: float, rng: torch.Generator
) -> None:
    case = replace(CASES[name], dtype=dtype)
    weights, batch = make_weights(case, rng), make_batch(case, rng)
    out = run(build(case, weights), batch)
    assert out.dtype == dtype
    assert_right(out, in_float64(case, weights, batch), tolerance)


@pytest.mark.parametrize("width", [32, 40], ids=["upstream", "torch"])
def test_no_tokens(width: int, rng: torch.Generator) -> None:
    case = Case(width=width, has_correction=True)
    layer = build(case, make_weights(case, rng))
    assert run(layer, make_batch(case, rng, num_tokens=0)).shape == (0, case.hidden)


@monolithic
def test_upstream_keeps_what_it_applies_right(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its grouped product, of whatever router; of float32 on CPUs without AMX. Its
    build for CPUs without AVX-512 has none."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    upstreams = {
        name
        for name, case in CASES.items()
        if isinstance(
            experts_of(
                build_anew(case, make_weights(case, rng))
            ).quant_method.cpu_fused_moe,
            cpu_fused_moe.CPUFusedMOE,
        )
    }
    if not hasattr(torch.ops._C, "prepack_moe_weight"):
        assert not upstreams
        return
    torch_alone = {"step-3.5", "deepseek-v4"} | EXPERTS.keys()
    assert upstreams == CASES.keys() - torch_alone | {
        "gelu",
        "swigluoai",
        "gpt-oss",
        "bias",
        "width-32",
    }


def build_anew(case: Case, weights: Weights) -> Any:
    """One more layer of the same name."""
    from vllm.config import get_current_vllm_config

    get_current_vllm_config().compilation_config.static_forward_context.clear()
    return build(case, weights)


@monolithic
@pytest.mark.parametrize("width", [64, 40], ids=["upstream", "torch"])
@pytest.mark.parametrize("mapped", [False, True], ids=["all", "expert_map"])
def test_ids_that_are_no_expert_add_nothing(
    width: int, mapped: bool, rng: torch.Generator
) -> None:
    """-1 is not the last expert, and nothing beyond the last is written."""
    expert_map = (2, -1, 0, 3, -1, 1, -1, 4) if mapped else None
    case = Case(width=width, custom=True, expert_map=expert_map)
    weights, batch = make_weights(case, rng), make_batch(case, rng)
    layer = build(case, weights)
    choose = layer.router.custom_routing_function
    wrong = torch.rand(len(batch.x), case.top_k, generator=rng, device="cpu") < 0.4
    wrong[3] = True
    outside = torch.tensor([-1, -8, NUM_EXPERTS, 2**30], dtype=torch.int32)

    def choose_some(**options: Any) -> tuple[Tensor, Tensor]:
        topk_weights, ids = choose(**options)
        ids[wrong] = outside.repeat(ids.numel())[: int(wrong.sum())]
        return topk_weights, ids

    layer.router.custom_routing_function = choose_some
    out = run(layer, batch)

    _, chosen = route(case, weights, batch)
    expected = torch.zeros(batch.x.shape, dtype=torch.float64)
    for slot in range(case.top_k):
        # One slot at a time, of the tokens in which it was left alone.
        expected += torch.where(
            wrong[:, slot, None],
            0.0,
            in_float64_of_slot(case, weights, batch, chosen, slot),
        )
    assert_right(out, expected)
    assert not out[3].any()


def in_float64_of_slot(
    case: Case, weights: Weights, batch: Batch, chosen: list[list[int]], slot: int
) -> Tensor:
    """What each token's expert number `slot` adds."""
    out = torch.zeros(batch.x.shape, dtype=torch.float64)
    for token, ids in enumerate(chosen):
        e = ids[slot]
        if case.expert_map is not None and case.expert_map[e] < 0:
            continue
        h = act(case, weights.w13[e].double() @ batch.x[token].double())
        out[token] = (
            weights.w2[e].double() @ h * batch.logits[token, e].double().sigmoid()
        )
    return out


def test_one_expert_twice(rng: torch.Generator) -> None:
    """Both slots of a token count; upstream's loop counts one, and mixes tokens up."""
    for width in (64, 40):
        case = Case(width=width, custom=True)
        weights, batch = make_weights(case, rng), make_batch(case, rng)
        layer = build_anew(case, weights)
        ids = torch.randint(8, (len(batch.x), 1), generator=rng, device="cpu").int()
        layer.router.custom_routing_function = lambda ids=ids, **_: (
            torch.full(ids.shape, 0.5).expand(-1, 3).contiguous(),
            ids.expand(-1, 3),
        )
        expected = torch.stack(
            [
                weights.w2[e].double() @ act(case, weights.w13[e].double() @ x.double())
                for x, e in zip(batch.x, ids.flatten().tolist(), strict=True)
            ]
        )
        assert_right(run(layer, batch), 1.5 * expected)


@monolithic
@pytest.mark.parametrize(
    "case, message",
    [
        (Case(activation="relu2"), "swiglustep.*not relu2: run this model on a GPU"),
        (Case(activation="gelu", swiglu_limit=7.0), "not gelu with swiglu_limit 7.0"),
    ],
    ids=["activation", "limit"],
)
def test_what_nothing_computes_is_refused_as_it_loads(
    case: Case, message: str, rng: torch.Generator
) -> None:
    with pytest.raises(NotImplementedError, match=f"{LAYER}: .*{message}"):
        build(case, make_weights(case, rng))


@monolithic
@pytest.mark.parametrize("name", ["ernie-4.5", "step-3.5", "deepseek-v3", "expert-map"])
def test_compiles_whole(name: str, rng: torch.Generator) -> None:
    """vLLM compiles the model with this in it, without a break in the graph."""
    case = CASES[name]
    weights, batch = make_weights(case, rng), make_batch(case, rng)
    layer = experts_of(build(case, weights))

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        return layer.quant_method.apply_monolithic(layer, x, logits)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(batch.x, batch.logits), forward(batch.x, batch.logits))


def test_is_sound_where_compiled(rng: torch.Generator) -> None:
    case = CASES["expert-map"]
    weights, batch = make_weights(case, rng), make_batch(case, rng)
    experts = slice(0, case.num_local)
    arguments = (
        *(batch.x, weights.w13[experts], weights.w2[experts]),
        *(torch.rand(19, 3), torch.randint(8, (19, 3)), "silu", False),
        *(torch.tensor(case.expert_map), None, None, None),
    )
    torch.library.opcheck(
        torch.ops.quark_int8.cpu_unquantized_experts.default, arguments
    )


@monolithic
def test_kernel_for_amx_gets_what_it_knows(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silu, without bias, weighted at the end: no more, whatever it is asked."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setenv("VLLM_CPU_SGL_KERNEL", "1")
    fields: dict[str, Callable[[Case], Any]] = {
        "activation": lambda case: MoEActivation.from_str(case.activation),
        "expert_map": lambda case: case.expert_map,
        "apply_router_weight_on_input": lambda case: case.on_input,
        "w13_bias": lambda case: True if case.has_bias else None,
        "swiglu_limit": lambda case: case.swiglu_limit,
    }
    for case in CASES.values():
        layer = SimpleNamespace(**{name: get(case) for name, get in fields.items()})
        known = (
            case.activation == "silu"
            and case.swiglu_limit is None
            and not (case.has_bias or case.on_input or case.expert_map)
        )
        assert cpu_unquantized_moe.upstream_serves(layer) == known
