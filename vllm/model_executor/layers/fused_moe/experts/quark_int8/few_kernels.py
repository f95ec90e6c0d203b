# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Triton kernels of the INT8 (W8A8) fused MoE for a few tokens, which quantize for
themselves.

In shapes M is num_tokens, P num_pairs, E num_experts, N size_n and K size_k.
"""

from vllm.model_executor.kernels.int8_triton import (
    dot4,
    pack4,
    quantize,
    quantize_static,
    quantize_token,
    wait_for_inputs,
)
from vllm.model_executor.layers.fused_moe.experts.quark_int8.common_kernels import (
    activate,
    local_experts,
)
from vllm.triton_utils import tl, triton


@triton.jit
def _load_gate_up(w_ptr, n, size_n, words, BLOCK_SIZE_K: tl.constexpr):
    """Rows n of an expert's gate and up projections, in words of four int8."""
    k = tl.arange(0, BLOCK_SIZE_K)
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * words + k[None, :]
    mask = (n < size_n)[:, None] & (k < words)[None, :]
    w_gate = tl.load(w_ptrs, mask=mask, other=0)
    w_up = tl.load(w_ptrs + size_n.to(tl.int64) * words, mask=mask, other=0)
    return w_gate, w_up


@triton.jit(do_not_specialize=["num_ids", "topk"])
def w13_few_kernel(
    x_ptr,
    x_static_scale_ptr,
    w13_ptr,
    w13_scale_ptr,
    bias_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    h_ptr,
    num_ids,
    size_n,
    size_k,
    topk,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    HAS_EXPERT_MAP: tl.constexpr,
    STATIC_X: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SWIGLUSTEP_LIMIT: tl.constexpr,
    DOT4: tl.constexpr,
    TURNS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """`w13_kernel` for a few tokens: each program multiplies one pair's whole row.

    x [M, K] and w13 [E, 2N, K], both read as whole words of four int8, to h [P, N] in
    the dtype of x. A program that takes one block of rows asks for its weights before
    it quantizes the token: their addresses need nothing but the routing. BLOCK_SIZE_K
    >= K / 4 counts words.
    """
    pair = tl.program_id(1)
    k = tl.arange(0, BLOCK_SIZE_K)
    words = size_k // 4
    wait_for_inputs(PDL)
    expert = local_experts(
        topk_ids_ptr, expert_map_ptr, pair, pair >= 0, num_ids, HAS_EXPERT_MAP
    ).to(tl.int64)
    if expert < 0:
        return
    w13_ptr += expert * 2 * size_n * words
    n = tl.program_id(0) * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    if not TURNS:
        w_gate, w_up = _load_gate_up(w13_ptr, n, size_n, words, BLOCK_SIZE_K)
    token = pair // topk
    x_offsets = token.to(tl.int64) * size_k + k[:, None] * 4 + tl.arange(0, 4)[None, :]
    x = tl.load(x_ptr + x_offsets, mask=(k < words)[:, None], other=0.0).to(tl.float32)
    xq, x_scale = quantize_token(x, x_static_scale_ptr, STATIC_X)
    xq = tl.broadcast_to(xq[None, :], (BLOCK_SIZE_N, BLOCK_SIZE_K))
    zeros = tl.zeros((BLOCK_SIZE_N, BLOCK_SIZE_K), tl.int32)

    for n0 in tl.range(
        tl.program_id(0) * BLOCK_SIZE_N,
        size_n,
        tl.num_programs(0) * BLOCK_SIZE_N,
        num_stages=STAGES,
    ):
        n = n0 + tl.arange(0, BLOCK_SIZE_N)
        rows = expert * 2 * size_n + n
        if TURNS:
            w_gate, w_up = _load_gate_up(w13_ptr, n, size_n, words, BLOCK_SIZE_K)
        gate = tl.sum(dot4(w_gate, xq, zeros, DOT4), axis=1).to(tl.float32)
        up = tl.sum(dot4(w_up, xq, zeros, DOT4), axis=1).to(tl.float32)
        if PER_CHANNEL:
            gate *= x_scale * tl.load(w13_scale_ptr + rows, mask=n < size_n, other=0.0)
            up *= x_scale * tl.load(
                w13_scale_ptr + rows + size_n, mask=n < size_n, other=0.0
            )
        else:
            w_scale = tl.load(w13_scale_ptr + expert)
            gate *= x_scale * w_scale
            up *= x_scale * w_scale
        if HAS_BIAS:
            gate += tl.load(bias_ptr + rows, mask=n < size_n, other=0.0).to(tl.float32)
            up += tl.load(bias_ptr + rows + size_n, mask=n < size_n, other=0.0).to(
                tl.float32
            )
        h = activate(gate, up, SWIGLUSTEP_LIMIT).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + pair.to(tl.int64) * size_n + n, h, mask=n < size_n)


@triton.jit(do_not_specialize=["num_ids", "topk"])
def w2_few_kernel(
    h_ptr,
    h_static_scale_ptr,
    w2_ptr,
    w2_scale_ptr,
    bias_ptr,
    topk_weights_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    out_ptr,
    num_ids,
    size_n,
    size_k,
    topk,
    TOPK: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    HAS_EXPERT_MAP: tl.constexpr,
    STATIC_H: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    APPLY_ROUTER_WEIGHT: tl.constexpr,
    DOT4: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """`w2_kernel` and `sum_topk_kernel` for a few tokens.

    h [P, K] and w2 [E, N, K] to out [M, N]; here N counts the output's columns and K
    the expert's width. A program multiplies all of a token's pairs for BLOCK_SIZE_N
    columns and adds them up. The weights' addresses need only the routing, which is
    older than the kernel before, so they are on their way while that one ends.
    BLOCK_SIZE_K >= K / 4 counts words, TOPK >= topk pairs.
    """
    token = tl.program_id(1)
    k = tl.arange(0, BLOCK_SIZE_K)
    words = size_k // 4
    j = tl.arange(0, TOPK)
    pairs = token * topk + j
    experts = local_experts(
        topk_ids_ptr, expert_map_ptr, pairs, j < topk, num_ids, HAS_EXPERT_MAP
    ).to(tl.int64)
    present = experts >= 0
    wait_for_inputs(PDL)
    h_offsets = (
        pairs.to(tl.int64)[:, None, None] * size_k
        + k[None, :, None] * 4
        + tl.arange(0, 4)[None, None, :]
    )
    mask = present[:, None, None] & (k < words)[None, :, None]
    h = tl.load(h_ptr + h_offsets, mask=mask, other=0.0).to(tl.float32)
    if STATIC_H:
        h_scale = tl.zeros((TOPK,), tl.float32) + tl.load(h_static_scale_ptr)
        hq = pack4(quantize_static(h, tl.load(h_static_scale_ptr)))
    else:
        absmax = tl.maximum(tl.max(tl.max(tl.abs(h), axis=2), axis=1), 1e-10)
        h_scale = tl.div_rn(absmax, 127.0)
        hq = pack4(quantize(h, absmax[:, None, None]))
    # Pairs and columns make one dimension: row r is column r % BLOCK_SIZE_N of its
    # pair.
    hq = tl.broadcast_to(hq[:, None, :], (TOPK, BLOCK_SIZE_N, BLOCK_SIZE_K))
    hq = hq.reshape(TOPK * BLOCK_SIZE_N, BLOCK_SIZE_K)
    zeros = tl.zeros((TOPK * BLOCK_SIZE_N, BLOCK_SIZE_K), tl.int32)
    row_experts = tl.broadcast_to(experts[:, None], (TOPK, BLOCK_SIZE_N))
    row_experts = row_experts.reshape(TOPK * BLOCK_SIZE_N)
    column = tl.arange(0, TOPK * BLOCK_SIZE_N) % BLOCK_SIZE_N
    if not PER_CHANNEL:
        h_scale *= tl.load(w2_scale_ptr + experts, mask=present, other=0.0)
    if APPLY_ROUTER_WEIGHT:
        weight = tl.load(topk_weights_ptr + pairs, mask=present, other=0.0)
        weight = weight.to(tl.float32)

    for n0 in tl.range(
        tl.program_id(0) * BLOCK_SIZE_N,
        size_n,
        tl.num_programs(0) * BLOCK_SIZE_N,
        num_stages=STAGES,
    ):
        n = n0 + tl.arange(0, BLOCK_SIZE_N)
        rows = experts[:, None] * size_n + n[None, :]
        row_mask = present[:, None] & (n < size_n)[None, :]
        w_ptrs = (
            w2_ptr + (row_experts * size_n + n0 + column)[:, None] * words + k[None, :]
        )
        w_mask = (row_experts >= 0) & (n0 + column < size_n)
        w = tl.load(w_ptrs, mask=w_mask[:, None] & (k < words)[None, :], other=0)
        y = tl.sum(dot4(w, hq, zeros, DOT4), axis=1).to(tl.float32)
        y = y.reshape(TOPK, BLOCK_SIZE_N)
        if PER_CHANNEL:
            w_scale = tl.load(w2_scale_ptr + rows, mask=row_mask, other=0.0)
            y *= h_scale[:, None] * w_scale
        else:
            y *= h_scale[:, None]
        if HAS_BIAS:
            y += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)
        if APPLY_ROUTER_WEIGHT:
            y *= weight[:, None]
        y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
        total = tl.sum(tl.where(row_mask, y, 0.0), axis=0)
        out_ptrs = out_ptr + token.to(tl.int64) * size_n + n
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=n < size_n)
