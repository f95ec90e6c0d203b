# SPDX-License-Identifier: Apache-2.0
"""Unquantized experts in float64, each token by itself, and random layers to ask."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

NUM_EXPERTS, VOCABULARY = 8, 50


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
