# SPDX-License-Identifier: Apache-2.0
"""Routing on a CPU, through upstream's own routers, against float64."""

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import vllm._custom_ops as ops
from torch import Tensor
from vllm.model_executor.layers.fused_moe import fused_moe
from vllm.model_executor.layers.fused_moe.router import grouped_topk_router
from vllm.model_executor.layers.fused_moe.router.cpu_topk import (
    topk_sigmoid,
    topk_softmax,
)
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import (
    fused_topk_bias,
)
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk
from vllm.model_executor.layers.fused_moe.router.router_factory import (
    create_fused_moe_router,
)
from vllm.platforms import current_platform

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="needs a vLLM built for CPUs"
)

TOPK: dict[str, Callable[..., None]] = {
    "sigmoid": topk_sigmoid,
    "softmax": topk_softmax,
}
each_scoring_func = pytest.mark.parametrize("scoring_func", TOPK)
each_renormalize = pytest.mark.parametrize(
    "renormalize", [False, True], ids=["scores", "renormalized"]
)


def in_float64(
    logits: Tensor,
    scoring_func: str,
    top_k: int,
    renormalize: bool,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Weights and ids, one token at a time. Ties go to the lower id."""
    weights, ids = [], []
    for row in logits.double():
        exps = row.exp()
        scores = {
            "softmax": exps / exps.sum(),
            "sigmoid": exps / (1 + exps),
            "sqrtsoftplus": (1 + exps).log().sqrt(),
        }[scoring_func]
        biased = scores if bias is None else scores + bias.double()
        best = sorted(range(len(row)), key=lambda e: (-biased[e].item(), e))[:top_k]
        chosen = scores[best]
        weights.append(chosen / chosen.sum() if renormalize else chosen)
        ids.append(best)
    return torch.stack(weights), torch.tensor(ids)


@pytest.mark.parametrize("scoring_func", [*TOPK, "sqrtsoftplus"])
@each_renormalize
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 33])
def test_router_with_bias_matches_float64(
    scoring_func, renormalize, dtype, num_tokens, rng
):
    """Step-3.5's: 288 experts, top 8, a float32 bias and a scaling factor."""
    logits = torch.randn(num_tokens, 288, generator=rng).to(dtype)
    bias = torch.randn(288, generator=rng)
    weights, ids = fused_topk_bias(
        hidden_states=torch.empty(num_tokens, 1),
        gating_output=logits,
        scoring_func=scoring_func,
        e_score_correction_bias=bias,
        topk=8,
        renormalize=renormalize,
        routed_scaling_factor=3.0,
    )
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert weights.shape == ids.shape == (num_tokens, 8)
    if num_tokens:
        expected, expected_ids = in_float64(logits, scoring_func, 8, renormalize, bias)
        assert torch.equal(ids.long(), expected_ids)
        torch.testing.assert_close(weights.double(), 3 * expected, rtol=1e-5, atol=0)


@each_scoring_func
@each_renormalize
def test_router_without_bias_matches_float64(scoring_func, renormalize, rng):
    logits = torch.randn(33, 60, generator=rng)
    weights, ids, _ = fused_topk(
        torch.empty(33, 1), logits, 4, renormalize, torch.int64, scoring_func
    )
    expected, expected_ids = in_float64(logits, scoring_func, 4, renormalize, None)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=0)


@each_renormalize
def test_router_by_token_matches_float64(renormalize, rng):
    """DeepSeek-V4's first layers: a table says each token's experts."""
    logits = torch.randn(33, 16, generator=rng)
    table = torch.rand(100, 16, generator=rng).argsort()[:, :4]
    tokens = torch.randint(100, (33,), generator=rng)
    weights, ids = fused_topk_bias(
        hidden_states=torch.empty(33, 1),
        gating_output=logits,
        scoring_func="sqrtsoftplus",
        e_score_correction_bias=None,
        topk=4,
        renormalize=renormalize,
        input_tokens=tokens,
        hash_indices_table=table.int(),
        routed_scaling_factor=1.5,
    )
    expected, all_ids = in_float64(logits, "sqrtsoftplus", 16, False, None)
    expected = expected.gather(1, all_ids.argsort()).gather(1, table[tokens])
    if renormalize:
        expected /= expected.sum(1, keepdim=True)
    assert torch.equal(ids.long(), table[tokens])
    torch.testing.assert_close(weights.double(), 1.5 * expected, rtol=1e-5, atol=0)


def grouped_router(top_k: int, bias: Tensor | None, scoring_func: str) -> Any:
    """Of 32 experts in eight groups, of which the best three count."""
    return create_fused_moe_router(
        top_k=top_k,
        global_num_experts=32,
        use_grouped_topk=True,
        num_expert_group=8,
        topk_group=3,
        scoring_func=scoring_func,
        routed_scaling_factor=2.5,
        e_score_correction_bias=bias,
    )


@each_scoring_func
@pytest.mark.parametrize("has_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_router_of_groups_matches_float64(scoring_func, has_bias, dtype, rng):
    """Nothing is compiled, and scores are float32 whatever the logits."""
    # No two alike, which may come in any order.
    logits = (torch.rand(33, 32, generator=rng).argsort() / 8 - 2).to(dtype)
    bias = torch.randn(32, generator=rng) if has_bias else None
    router = grouped_router(4, bias, scoring_func)
    with patch.object(grouped_topk_router, "grouped_topk", pytest.fail):
        weights, ids = router.select_experts(torch.empty(33, 1), logits)

    scores, all_ids = in_float64(logits, scoring_func, 32, False, None)
    scores = scores.gather(1, all_ids.argsort())
    biased = scores if bias is None else scores + bias.double()
    # A group is worth its best expert, or with a bias its two best.
    worth = biased.view(33, 8, 4).topk(2 if has_bias else 1).values.sum(-1)
    left_out = worth < worth.topk(3).values[:, -1:]
    biased = biased.masked_fill(left_out.repeat_interleave(4, dim=1), -torch.inf)
    expected_ids = biased.topk(4).indices.sort().values
    expected = scores.gather(1, expected_ids)
    expected *= 2.5 / expected.sum(1, keepdim=True)
    ids, order = ids.long().sort()
    assert torch.equal(ids, expected_ids)
    weights = weights.gather(1, order)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.skipif(
    find_spec("vllm.model_executor.layers.fused_moe.router.cpu_router") is not None,
    reason="the base has a router of its own for CPUs",
)
def test_other_platforms_keep_their_router_of_groups(monkeypatch):
    calls = []
    gpu = SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setattr(grouped_topk_router, "current_platform", gpu)

    def grouped_topk(**asked: Any) -> tuple[None, None]:
        calls.append(asked)
        return None, None

    monkeypatch.setattr(grouped_topk_router, "grouped_topk", grouped_topk)
    grouped_router(4, None, "softmax")._compute_routing(
        torch.empty(3, 1), torch.empty(3, 32), None
    )
    [asked] = calls
    assert (asked["topk"], asked["routed_scaling_factor"]) == (4, 2.5)


def test_experts_without_weights_pass_the_token_on(rng):
    """LongCat-Flash's: those after the others."""
    x = torch.randn(33, 48, generator=rng).bfloat16()
    ids = torch.randint(12, (33, 3), generator=rng)
    weights = torch.rand(33, 3, generator=rng)
    out = fused_moe.zero_experts_compute_triton(
        ids.clone(), weights.clone(), 8, "identity", x
    )
    expected = torch.zeros(33, 48, dtype=torch.float64)
    for token, slot in (ids >= 8).nonzero().tolist():
        expected[token] += weights[token, slot].double() * x[token].double()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=0)


def test_other_experts_without_weights_are_refused():
    nothing = torch.empty(0, 1)
    with pytest.raises(NotImplementedError, match="expected .* identity, found copy"):
        fused_moe.zero_experts_compute_triton(nothing, nothing, 8, "copy", nothing)


def route(
    scoring_func: str, logits: Tensor, top_k: int, *options: Any
) -> tuple[Tensor, Tensor]:
    """The operator itself, with outputs that hold what no router writes."""
    weights = torch.full((len(logits), top_k), torch.nan)
    ids = torch.full((len(logits), top_k), -1, dtype=torch.int32)
    TOPK[scoring_func](weights, ids, logits, *options)
    return weights, ids


@each_scoring_func
@pytest.mark.parametrize("num_experts", [16, 288])
def test_ties_go_to_the_lower_id(scoring_func, num_experts):
    logits = torch.zeros(50, num_experts)
    logits[:, num_experts // 2 :] = 1
    _, ids = route(scoring_func, logits, num_experts // 2 + 2)
    higher = list(range(num_experts // 2, num_experts))
    assert ids.tolist() == [[*higher, 0, 1]] * 50


@each_scoring_func
def test_bias_chooses_and_does_not_weigh(scoring_func, rng):
    logits = torch.randn(5, 16, generator=rng)
    bias = torch.zeros(16)
    bias[[3, 11]] = 100.0
    bias[11] += 1
    weights, ids = route(scoring_func, logits, 2, False, bias)
    assert ids.tolist() == [[11, 3]] * 5
    unbiased, unbiased_ids = route(scoring_func, logits, 16)
    for row, slot in ((0, 11), (4, 3)):
        position = unbiased_ids[row].tolist().index(slot)
        assert weights[row, [11, 3].index(slot)] == unbiased[row, position]


def test_scores_that_underflow_stay_zero():
    weights, _ = route("sigmoid", torch.full((2, 8), -200.0), 4, True)
    assert torch.equal(weights, torch.zeros(2, 4))


@each_scoring_func
def test_compiles_whole(scoring_func, rng):
    logits = torch.randn(5, 16, generator=rng)
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    expected = route(scoring_func, logits, 4, True)
    for output, eager in zip(
        compiled(scoring_func, logits, 4, True), expected, strict=True
    ):
        assert torch.equal(output, eager)


@each_scoring_func
def test_other_platforms_keep_their_operator(scoring_func, monkeypatch):
    calls = []
    name = f"topk_{scoring_func}"
    operators = SimpleNamespace(**{name: lambda *args: calls.append(args)})
    gpu = SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setattr(ops, "current_platform", gpu)
    monkeypatch.setattr(torch.ops, "_moe_C", operators, raising=False)
    # A number of experts that upstream's operator keeps on every GPU.
    arguments = tuple(torch.empty(1, 256) for _ in range(6))
    getattr(ops, name)(*arguments)
    [asked] = calls
    # Newer releases add a factor and what is padding.
    assert len(asked) >= len(arguments)
    assert all(found is given for found, given in zip(asked, arguments, strict=False))
