# SPDX-License-Identifier: Apache-2.0
"""Unquantized experts on a CPU, routed by the layer's own router, against float64.

The reference routes and computes each token by itself. In float32 what is left to
differ is the order of operations; a router takes float32 logits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.platforms import current_platform

from tests.moe_layers import experts_of, make_moe

cpu_fused_moe: Any = pytest.importorskip(
    "vllm.model_executor.layers.fused_moe.cpu_fused_moe",
    reason="this release's oracle chooses unquantized experts on a CPU, too: "
    "CpuUnquantizedExperts serves there, not cpu_unquantized_moe",
)
from vllm.model_executor.layers.fused_moe import cpu_unquantized_moe  # noqa: E402

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="needs a vLLM built for CPUs"
)

NUM_EXPERTS, VOCABULARY = 8, 50
LAYER = "model.layers.0.mlp.experts"


@dataclass(frozen=True)
class Case:
    """A layer, beside its weights."""

    width: int = 64
    hidden: int = 64
    top_k: int = 3
    activation: str = "silu"
    scores: str = "softmax"
    renormalize: bool = True
    has_correction: bool = False
    groups: tuple[int, int] | None = None  # how many, and of how many experts come
    factor: float = 1.0
    custom: bool = False
    hashed: bool = False
    num_zero: int = 0  # experts without weights, after the others
    has_bias: bool = False
    on_input: bool = False
    swiglu_limit: float | None = None
    expert_map: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32

    @property
    def num_local(self) -> int:
        """Experts of this rank."""
        return NUM_EXPERTS if self.expert_map is None else max(self.expert_map) + 1


def choose_custom(
    hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """Sigmoid weights of the highest logits of every other expert."""
    logits, ids = gating_output[:, ::2].topk(topk)
    return logits.float().sigmoid(), (2 * ids).int()


ROUTERS = {
    "softmax": Case(),
    "softmax-scores": Case(renormalize=False),
    "ernie-4.5": Case(has_correction=True),
    "sigmoid": Case(scores="sigmoid"),
    "minimax-m2": Case(scores="sigmoid", has_correction=True),
    "step-3.5": Case(
        scores="sigmoid", has_correction=True, factor=3.0, activation="swiglustep"
    ),
    "deepseek-v2": Case(groups=(4, 2), renormalize=False, factor=16.0),
    "deepseek-v3": Case(
        scores="sigmoid", has_correction=True, groups=(4, 2), factor=2.5
    ),
    "glm-4": Case(scores="sigmoid", has_correction=True, groups=(1, 1), factor=2.5),
    # For which upstream makes a router without a scaling factor.
    "one-group": Case(scores="sigmoid", groups=(1, 1), factor=2.5),
    "llama-4": Case(custom=True, top_k=1, on_input=True),
    "custom": Case(custom=True),
    "deepseek-v4": Case(
        scores="sqrtsoftplus", has_correction=True, factor=1.5, swiglu_limit=1.0
    ),
    "hashed": Case(scores="sqrtsoftplus", hashed=True, factor=1.5),
    "longcat": Case(has_correction=True, num_zero=3, factor=6.0, renormalize=False),
}
EXPERTS = {
    **{activation: Case(activation=activation) for activation in ("gelu", "swigluoai")},
    "gpt-oss": Case(activation="swigluoai", has_bias=True),
    "bias": Case(has_bias=True),
    # Widths that upstream's grouped product takes, refuses as it runs, never takes.
    **{f"width-{width}": Case(width=width) for width in (32, 48, 176, 40)},
    "hidden-80": Case(hidden=80),
    "on-input": Case(on_input=True),
    "on-input-bias": Case(on_input=True, has_bias=True, top_k=1, renormalize=False),
    "swiglustep-bias": Case(activation="swiglustep", has_bias=True),
    "expert-map": Case(expert_map=(2, -1, 0, 3, -1, 1, -1, 4)),
    "no-expert": Case(expert_map=(-1, -1, -1, -1, -1, -1, -1, 0), top_k=1),
    "mapped-bias": Case(expert_map=(-1, 0, -1, 1, -1, 2, -1, 3), has_bias=True),
    "zero-experts-of-any-width": Case(has_correction=True, num_zero=3, width=40),
}
CASES = ROUTERS | EXPERTS


@dataclass
class Weights:
    """Of all experts of the model."""

    w13: Tensor  # [E, 2N, K]
    w2: Tensor  # [E, K, N]
    w13_bias: Tensor | None = None  # [E, 2N]
    w2_bias: Tensor | None = None  # [E, K]
    correction: Tensor | None = None  # [E], of the scores
    table: Tensor | None = None  # [vocabulary, top k]


@dataclass
class Batch:
    x: Tensor  # [M, K]
    logits: Tensor  # [M, E]
    input_ids: Tensor = field(default_factory=lambda: torch.empty(0))  # [M]


def make_weights(case: Case, rng: torch.Generator) -> Weights:
    """Experts whose first product returns values of about 4: enough to be clipped or
    not."""

    def random(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=rng, device="cpu") * scale
        return values.to(case.dtype)

    num, width, hidden = NUM_EXPERTS, case.width, case.hidden
    weights = Weights(
        random(num, 2 * width, hidden, scale=4 / hidden**0.5),
        random(num, hidden, width, scale=1 / width**0.5),
    )
    if case.has_bias:
        weights.w13_bias, weights.w2_bias = random(num, 2 * width), random(num, hidden)
    if case.has_correction:
        weights.correction = random(num + case.num_zero).float()
    if case.hashed:
        order = torch.rand(VOCABULARY, num, generator=rng, device="cpu").argsort()
        weights.table = order[:, : case.top_k]
    return weights


def make_batch(case: Case, rng: torch.Generator, num_tokens: int = 19) -> Batch:
    size = (num_tokens, NUM_EXPERTS + case.num_zero)
    return Batch(
        torch.randn(num_tokens, case.hidden, generator=rng, device="cpu").to(
            case.dtype
        ),
        torch.randn(size, generator=rng, device="cpu") * 2,
        torch.randint(VOCABULARY, size[:1], generator=rng, device="cpu"),
    )


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


def route(case: Case, weights: Weights, batch: Batch) -> tuple[Tensor, list[list[int]]]:
    """Each token's experts, and all experts' weights [M, E], in float64."""
    if case.custom:
        chosen = [
            [2 * e for e in sorted(range(4), key=lambda e: -row[2 * e])[: case.top_k]]
            for row in batch.logits
        ]
        return batch.logits.double().sigmoid(), chosen
    logits = batch.logits.double()
    scores = {
        "softmax": lambda: logits.exp() / logits.exp().sum(1, keepdim=True),
        "sigmoid": lambda: 1 / (1 + (-logits).exp()),
        "sqrtsoftplus": lambda: (1 + logits.exp()).log().sqrt(),
    }[case.scores]()
    biased = scores
    if weights.correction is not None:
        biased = scores + weights.correction.double()
    chosen = []
    for token, row in enumerate(biased.tolist()):
        if weights.table is not None:
            chosen.append(weights.table[batch.input_ids[token]].tolist())
            continue
        experts = list(range(len(row)))
        if case.groups is not None:
            num_groups, most = case.groups
            size = NUM_EXPERTS // num_groups
            best_of = 2 if case.has_correction else 1
            worth = [
                sum(sorted(row[g * size : (g + 1) * size])[-best_of:])
                for g in range(num_groups)
            ]
            kept = sorted(range(num_groups), key=lambda g: -worth[g])[:most]
            experts = [e for e in experts if e // size in kept]
        chosen.append(sorted(experts, key=lambda e: -row[e])[: case.top_k])
    result = torch.zeros_like(scores)
    for token, ids in enumerate(chosen):
        result[token, ids] = scores[token, ids]
    if case.renormalize:
        result /= result.sum(1, keepdim=True)
    return result * case.factor, chosen


def act(case: Case, h: Tensor) -> Tensor:
    if case.activation == "swigluoai":
        gate, up = h[::2].clamp(max=7), h[1::2].clamp(-7, 7)
        return (up + 1) * gate / (1 + (-1.702 * gate).exp())
    gate, up = h.chunk(2)
    if case.swiglu_limit is not None:
        limit = case.swiglu_limit
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if case.activation == "gelu":
        return gate * (1 + (gate / 2**0.5).erf()) / 2 * up
    gate = gate / (1 + (-gate).exp())
    if case.activation == "swiglustep":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate * up


def in_float64(case: Case, weights: Weights, batch: Batch) -> Tensor:
    router_weights, chosen = route(case, weights, batch)
    out = torch.zeros(batch.x.shape, dtype=torch.float64)
    for token, experts in enumerate(chosen):
        x = batch.x[token].double()
        for e in experts:
            weight = router_weights[token, e]
            if e >= NUM_EXPERTS:
                out[token] += x * weight
                continue
            if case.expert_map is not None and case.expert_map[e] < 0:
                continue
            h = weights.w13[e].double() @ x
            if weights.w13_bias is not None:
                h += weights.w13_bias[e].double()
            y = weights.w2[e].double() @ act(case, h * weight if case.on_input else h)
            if weights.w2_bias is not None:
                y += weights.w2_bias[e].double()
            out[token] += y if case.on_input else y * weight
    return out


def assert_right(out: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert out.shape == expected.shape
    error = (out.double() - expected).abs().max()
    assert error <= tolerance * expected.abs().max()


@pytest.fixture(autouse=True)
def _context(vllm_config: VllmConfig) -> None:
    """Every layer here is built under a current VllmConfig."""
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_layer_matches_float64(name: str, rng: torch.Generator) -> None:
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


def test_upstream_keeps_what_it_applies_right(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its grouped product, of whatever router; of float32 on CPUs without AMX."""
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
