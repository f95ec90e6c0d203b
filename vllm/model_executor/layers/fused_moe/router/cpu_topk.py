# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Top-k routing on a CPU: what the operators of these names do on GPUs, in torch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def topk_softmax(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
) -> None:
    """Route each token to the experts with the highest softmax scores.

    Scores are float32. The bias only moves the choice: weights are the scores without
    it, divided by their sum if `renormalize`. Of equal scores the lower id wins, and
    experts come in descending order, as on GPUs. A routed scaling factor is left to
    the caller, as there.

    Args:
        topk_weights: [M, topk] float32, written.
        topk_ids: [M, topk] integer, written.
        gating_output: [M, E], float: the router's logits.
        e_score_correction_bias: [E], float.
        is_padding: [M], of newer releases: tokens that nobody reads. They are routed
            like the others.
    """
    scores = gating_output.float().softmax(dim=-1)
    _choose(topk_weights, topk_ids, scores, renormalize, e_score_correction_bias)


def topk_sigmoid(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    is_padding: torch.Tensor | None = None,
) -> None:
    """Like `topk_softmax`, with sigmoid scores; their weights are scaled here, which
    upstream's operator does from 0.26.0 on."""
    scores = gating_output.float().sigmoid()
    _choose(topk_weights, topk_ids, scores, renormalize, e_score_correction_bias)
    topk_weights.mul_(routed_scaling_factor)


def topk_softplus_sqrt(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: torch.Tensor | None = None,
    input_tokens: torch.Tensor | None = None,
    hash_indices_table: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
    bias_vl: torch.Tensor | None = None,
    image_sentinel_lo: int = 0,
) -> None:
    """Like `topk_softmax`, with scores sqrt(log(1 + exp(logit))); their weights are
    scaled here.

    Args:
        input_tokens: [M], integer, and hash_indices_table: [vocabulary, topk], integer:
            each token's experts in place of those with the highest scores.

    Raises:
        NotImplementedError: images have a bias of their own.
    """
    if bias_vl is not None:
        raise NotImplementedError(
            "routing on a CPU: expected one bias for all tokens, found bias_vl for "
            f"those of images, from {image_sentinel_lo} up; run this model on a GPU"
        )
    scores = F.softplus(gating_output.float()).sqrt()
    chosen = None
    if hash_indices_table is not None:
        assert input_tokens is not None
        chosen = hash_indices_table[input_tokens].long()
    _choose(
        topk_weights, topk_ids, scores, renormalize, e_score_correction_bias, chosen
    )
    topk_weights *= routed_scaling_factor


def route(
    router_logits: torch.Tensor,
    topk: int,
    renormalize: bool,
    scoring_func: str,
    e_score_correction_bias: torch.Tensor | None,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the routers of GPUs choose without groups, for the one router that newer
    releases have on a CPU.

    The factor scales weights chosen with a bias; without one the caller does, as there.

    Args:
        router_logits: [M, E], float.
        scoring_func: softmax or sigmoid.
        e_score_correction_bias: [E], float.

    Returns:
        Weights float32 and ids int32 [M, topk].

    Raises:
        NotImplementedError: other scores.
    """
    operators: dict[str, Callable[..., None]] = {
        "softmax": topk_softmax,
        "sigmoid": topk_sigmoid,
    }
    choose = operators.get(scoring_func)
    if choose is None:
        raise NotImplementedError(
            "routing on a CPU: expected scores by softmax or sigmoid, found "
            f"{scoring_func}; run this model on a GPU"
        )
    size = router_logits.shape[0], topk
    weights = torch.empty(size, dtype=torch.float32, device=router_logits.device)
    ids = torch.empty(size, dtype=torch.int32, device=router_logits.device)
    choose(weights, ids, router_logits, renormalize, e_score_correction_bias)
    if e_score_correction_bias is not None:
        weights = weights * routed_scaling_factor
    return weights, ids


def zero_experts(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    zero_expert_type: str,
    hidden_states: torch.Tensor,
) -> torch.Tensor:
    """What the experts without weights add: hidden_states, [M, K], times the weights,
    [M, topk], of ids from num_experts up.

    Raises:
        NotImplementedError: experts that are not the identity.
    """
    if zero_expert_type != "identity":
        raise NotImplementedError(
            "experts without weights on a CPU: expected zero_expert_type identity, "
            f"found {zero_expert_type}; run this model on a GPU"
        )
    weights = topk_weights.float().where(topk_ids >= num_experts, 0.0)
    total = weights.sum(dim=-1, keepdim=True)
    return (hidden_states.float() * total).to(hidden_states.dtype)


def _choose(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    scores: torch.Tensor,
    renormalize: bool,
    bias: torch.Tensor | None,
    chosen: torch.Tensor | None = None,
) -> None:
    if chosen is None:
        biased = scores if bias is None else scores + bias.float()
        # Not torch.topk, which takes equal scores in any order.
        ranking = biased.argsort(dim=-1, descending=True, stable=True)
        chosen = ranking[:, : topk_ids.shape[1]]
    weights = scores.gather(1, chosen)
    if renormalize:
        # Scores that have all underflowed to zero stay zero.
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / total.clamp_min(torch.finfo(torch.float32).tiny)
    topk_weights.copy_(weights)
    topk_ids.copy_(chosen)
