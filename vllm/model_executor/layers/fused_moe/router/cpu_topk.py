# SPDX-License-Identifier: Apache-2.0
"""Top-k routing on a CPU: what the operators of these names do on GPUs, in torch."""

import torch


def topk_softmax(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None,
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
    """
    scores = gating_output.float().softmax(dim=-1)
    _choose(topk_weights, topk_ids, scores, renormalize, e_score_correction_bias)


def topk_sigmoid(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None,
) -> None:
    """Like `topk_softmax`, with sigmoid scores."""
    scores = gating_output.float().sigmoid()
    _choose(topk_weights, topk_ids, scores, renormalize, e_score_correction_bias)


def _choose(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    scores: torch.Tensor,
    renormalize: bool,
    bias: torch.Tensor | None,
) -> None:
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
