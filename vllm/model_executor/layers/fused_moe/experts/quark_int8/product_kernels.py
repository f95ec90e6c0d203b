# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Triton kernels of the INT8 (W8A8) fused MoE's products for many tokens.

Tiles are BLOCK_SIZE_M pairs of one expert, sorted by sort_kernels.py. Pairs lie in tile
order in everything between sorting and `w2_kernel`; padding rows are never written or
read as results. In order: w13 (with the activation), quantize_pairs, w2 or w2_narrow,
sum_topk.

Integer sums are exact, each value is quantized, scaled and rounded by itself, and the
sums over experts are taken in one order, without atomics: the same input gives the same
bits.

In shapes M is num_tokens, P num_pairs, E num_experts, N size_n and K size_k.
"""

from vllm.model_executor.kernels.int8_triton import wait_for_inputs
from vllm.model_executor.layers.fused_moe.experts.quark_int8.common_kernels import (
    activate,
    local_experts,
    quantize_rows,
)
from vllm.triton_utils import tl, triton


@triton.jit(do_not_specialize=["num_pairs"])
def quantize_pairs_kernel(
    h_ptr,
    static_scale_ptr,
    sorted_pairs_ptr,
    num_tiles_ptr,
    hq_ptr,
    scale_ptr,
    num_pairs,
    size_k,
    BLOCK_SIZE_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    STATIC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Quantize the rows of tiles that hold a pair.

    h [tiles * BLOCK_SIZE_M, K] float to hq, int8, and scale [tiles * BLOCK_SIZE_M]
    float32. Reads 2 K bytes a pair and writes K; a program has ROWS rows.
    """
    wait_for_inputs(PDL)
    start = tl.program_id(0) * ROWS
    if start >= tl.load(num_tiles_ptr) * BLOCK_SIZE_M:
        return
    rows = start + tl.arange(0, ROWS)
    is_row = rows < tl.load(num_tiles_ptr) * BLOCK_SIZE_M
    is_row = tl.load(sorted_pairs_ptr + rows, mask=is_row, other=num_pairs) < num_pairs
    quantize_rows(
        h_ptr,
        static_scale_ptr,
        hq_ptr,
        scale_ptr,
        rows,
        is_row,
        size_k,
        ROWS,
        BLOCK_SIZE_K,
        STATIC,
    )


@triton.jit
def _product(
    a,
    a_rows,
    a_row,
    a_mask,
    w,
    w_rows,
    w_row,
    size_k,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_W: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    TMA_A: tl.constexpr,
    TMA_W: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rows of a times rows of w, exact in int32.

    Args:
        a: int8, rows of K: a pointer, with a_rows [BLOCK_SIZE_M] int64 and a_mask
            [BLOCK_SIZE_M], or a descriptor of boxes, with a_row the first row.
        w: the same, with w_rows [BLOCK_SIZE_W] or w_row.

    Returns:
        [BLOCK_SIZE_M, BLOCK_SIZE_W], or transposed with SWAP_AB: then w fills the rows
        of the tensor cores, of which they have at least 64, and a the columns, of which
        8 will do.
    """
    # w is loaded as the product takes it, where it can be. For ROCm Triton 3.6 lays a
    # tile that is transposed after its load in LDS as it comes: lanes that hold one K
    # of 16 rows then read 16 words of one bank.
    W_IN_COLUMNS: tl.constexpr = not (TMA_W or SWAP_AB)
    k = tl.arange(0, BLOCK_SIZE_K)
    if not TMA_A:
        a_ptrs = a + a_rows[:, None] * size_k + k[None, :]
    if W_IN_COLUMNS:
        w_ptrs = w + w_rows[None, :] * size_k + k[:, None]
    elif not TMA_W:
        w_ptrs = w + w_rows[:, None] * size_k + k[None, :]
    if SWAP_AB:
        sums = tl.zeros((BLOCK_SIZE_W, BLOCK_SIZE_M), tl.int32)
    else:
        sums = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_W), tl.int32)
    for k0 in range(0, size_k, BLOCK_SIZE_K):
        if TMA_A:
            a_tile = a.load([a_row, k0])
        elif EVEN_K:
            a_tile = tl.load(a_ptrs, mask=a_mask[:, None], other=0)
        else:
            in_k = (k < size_k - k0)[None, :]
            a_tile = tl.load(a_ptrs, mask=a_mask[:, None] & in_k, other=0)
        if TMA_W:
            if INTERLEAVED:
                w_tile = w.load([w_row, 0, k0]).reshape(BLOCK_SIZE_W, BLOCK_SIZE_K)
            else:
                w_tile = w.load([w_row, k0])
        elif EVEN_K:
            w_tile = tl.load(w_ptrs)
        elif W_IN_COLUMNS:
            w_tile = tl.load(w_ptrs, mask=(k < size_k - k0)[:, None], other=0)
        else:
            w_tile = tl.load(w_ptrs, mask=(k < size_k - k0)[None, :], other=0)
        if SWAP_AB:
            sums = tl.dot(w_tile, a_tile.T, sums, out_dtype=tl.int32)
        elif W_IN_COLUMNS:
            sums = tl.dot(a_tile, w_tile, sums, out_dtype=tl.int32)
        else:
            sums = tl.dot(a_tile, w_tile.T, sums, out_dtype=tl.int32)
        if not TMA_A:
            a_ptrs += BLOCK_SIZE_K
        if not TMA_W:
            w_ptrs += BLOCK_SIZE_K
    return sums


@triton.jit
def _along_a(values, SWAP_AB: tl.constexpr):
    """[BLOCK_SIZE_M] in the place it has in what `_product` returns."""
    return values[None, :] if SWAP_AB else values[:, None]


@triton.jit
def _along_w(values, SWAP_AB: tl.constexpr):
    """[BLOCK_SIZE_W] in the place it has in what `_product` returns."""
    return values[:, None] if SWAP_AB else values[None, :]


@triton.jit
def _scale(
    sums,
    a_scale,
    w_scale_ptr,
    w_rows,
    expert,
    SWAP_AB: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
):
    """sums, as from `_product`, times a_scale [BLOCK_SIZE_M] and the weights'
    scales."""
    a_scale = _along_a(a_scale, SWAP_AB)
    if PER_CHANNEL:
        scale = a_scale * _along_w(tl.load(w_scale_ptr + w_rows), SWAP_AB)
    else:
        scale = a_scale * tl.load(w_scale_ptr + expert)
    return sums.to(tl.float32) * scale


@triton.jit
def _pairs_of(tile, tile_experts_ptr, sorted_pairs_ptr, BLOCK_SIZE_M: tl.constexpr):
    """A tile's expert, rows [BLOCK_SIZE_M] and pairs [BLOCK_SIZE_M]."""
    expert = tl.load(tile_experts_ptr + tile).to(tl.int64)
    rows = tile.to(tl.int64) * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    return expert, rows, tl.load(sorted_pairs_ptr + rows)


@triton.jit(do_not_specialize=["num_pairs", "topk"])
def w13_kernel(
    xq_ptr,
    x_scale_ptr,
    w13,
    w13_scale_ptr,
    bias_ptr,
    sorted_pairs_ptr,
    tile_experts_ptr,
    num_tiles_ptr,
    h_ptr,
    num_pairs,
    size_n,
    size_k,
    topk,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    TMA_W: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SWIGLUSTEP_LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Gate and up projection of each pair and the activation of both.

    h [tiles * BLOCK_SIZE_M, N] = act(xq @ w13.T), in the model's dtype. A tile is
    BLOCK_SIZE_M pairs by BLOCK_SIZE_N columns of both gate and up, so that the
    activation needs no memory traffic. Neighbouring programs share the pairs.

    Reads 2 N K bytes an expert, and its pairs' K bytes once for each BLOCK_SIZE_N
    columns (from L2); writes 2 N bytes a pair. 4 N K operations a pair.
    """
    wait_for_inputs(PDL)
    num_n = tl.cdiv(size_n, BLOCK_SIZE_N)
    tile = tl.program_id(0) // num_n
    n0 = tl.program_id(0) % num_n * BLOCK_SIZE_N
    if tile >= tl.load(num_tiles_ptr):
        return
    expert, rows, pairs = _pairs_of(
        tile, tile_experts_ptr, sorted_pairs_ptr, BLOCK_SIZE_M
    )
    is_pair = pairs < num_pairs
    tokens = (pairs // topk).to(tl.int64)
    n = n0 + tl.arange(0, BLOCK_SIZE_N)
    w_rows = expert * 2 * size_n + tl.minimum(n, size_n - 1)
    # Gate and up of a column are neighbours, so that one thread holds both.
    j = tl.arange(0, 2 * BLOCK_SIZE_N)
    sums = _product(
        xq_ptr,
        tokens,
        0,
        is_pair,
        w13,
        expert * 2 * size_n + tl.minimum(n0 + j // 2, size_n - 1) + j % 2 * size_n,
        (expert * 2 * size_n + n0).to(tl.int32),
        size_k,
        BLOCK_SIZE_M,
        2 * BLOCK_SIZE_N,
        BLOCK_SIZE_K,
        EVEN_K,
        SWAP_AB,
        False,
        TMA_W,
        True,
    )
    if SWAP_AB:
        sums = tl.permute(sums.reshape(BLOCK_SIZE_N, 2, BLOCK_SIZE_M), (0, 2, 1))
    else:
        sums = sums.reshape(BLOCK_SIZE_M, BLOCK_SIZE_N, 2)
    gate_sums, up_sums = tl.split(sums)
    x_scale = tl.load(x_scale_ptr + tokens, mask=is_pair, other=0.0)
    gate = _scale(
        gate_sums, x_scale, w13_scale_ptr, w_rows, expert, SWAP_AB, PER_CHANNEL
    )
    up = _scale(
        up_sums, x_scale, w13_scale_ptr, w_rows + size_n, expert, SWAP_AB, PER_CHANNEL
    )
    if HAS_BIAS:
        gate += _along_w(tl.load(bias_ptr + w_rows).to(tl.float32), SWAP_AB)
        up += _along_w(tl.load(bias_ptr + w_rows + size_n).to(tl.float32), SWAP_AB)
    h = activate(gate, up, SWIGLUSTEP_LIMIT)
    h_ptrs = h_ptr + _along_a(rows, SWAP_AB) * size_n + _along_w(n, SWAP_AB)
    mask = _along_a(is_pair, SWAP_AB) & _along_w(n < size_n, SWAP_AB)
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_pairs"])
def w2_kernel(
    hq,
    h_scale_ptr,
    w2,
    w2_scale_ptr,
    bias_ptr,
    topk_weights_ptr,
    sorted_pairs_ptr,
    tile_experts_ptr,
    num_tiles_ptr,
    y_ptr,
    num_pairs,
    size_n,
    size_k,
    first_n,
    end_n,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    TMA_A: tl.constexpr,
    TMA_W: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    APPLY_ROUTER_WEIGHT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Down projection of each pair, scattered back to the order of pairs.

    y [P, end_n - first_n] = (hq @ w2.T)[:, first_n:end_n], weighted by the router with
    APPLY_ROUTER_WEIGHT, in the model's dtype. Here N counts the output's columns, the
    model's hidden size, and K the expert's width. A tile is BLOCK_SIZE_M pairs by
    BLOCK_SIZE_N columns.

    Reads N K bytes an expert, and its pairs' K bytes once for each BLOCK_SIZE_N columns
    (from L2); writes 2 N bytes a pair. 2 N K operations a pair.
    """
    wait_for_inputs(PDL)
    num_n = tl.cdiv(end_n - first_n, BLOCK_SIZE_N)
    tile = tl.program_id(0) // num_n
    n0 = first_n + tl.program_id(0) % num_n * BLOCK_SIZE_N
    if tile >= tl.load(num_tiles_ptr):
        return
    expert, rows, pairs = _pairs_of(
        tile, tile_experts_ptr, sorted_pairs_ptr, BLOCK_SIZE_M
    )
    is_pair = pairs < num_pairs
    n = n0 + tl.arange(0, BLOCK_SIZE_N)
    w_rows = expert * size_n + tl.minimum(n, size_n - 1)
    sums = _product(
        hq,
        rows,
        tile * BLOCK_SIZE_M,
        is_pair,
        w2,
        w_rows,
        (expert * size_n + n0).to(tl.int32),
        size_k,
        BLOCK_SIZE_M,
        BLOCK_SIZE_N,
        BLOCK_SIZE_K,
        EVEN_K,
        SWAP_AB,
        TMA_A,
        TMA_W,
        False,
    )
    h_scale = tl.load(h_scale_ptr + rows, mask=is_pair, other=0.0)
    y = _scale(sums, h_scale, w2_scale_ptr, w_rows, expert, SWAP_AB, PER_CHANNEL)
    if HAS_BIAS:
        y += _along_w(tl.load(bias_ptr + w_rows).to(tl.float32), SWAP_AB)
    if APPLY_ROUTER_WEIGHT:
        weight = tl.load(topk_weights_ptr + pairs, mask=is_pair, other=0.0)
        y *= _along_a(weight.to(tl.float32), SWAP_AB)
    y_rows = y_ptr + _along_a(pairs.to(tl.int64), SWAP_AB) * (end_n - first_n)
    y_ptrs = y_rows + _along_w(n - first_n, SWAP_AB)
    mask = _along_a(is_pair, SWAP_AB) & _along_w(n < end_n, SWAP_AB)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_pairs"])
def w2_narrow_kernel(
    hq_ptr,
    h_scale_ptr,
    w2,
    w2_scale_ptr,
    bias_ptr,
    topk_weights_ptr,
    sorted_pairs_ptr,
    tile_experts_ptr,
    num_tiles_ptr,
    y_ptr,
    num_pairs,
    size_n,
    size_k,
    first_n,
    end_n,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    SWAP_AB: tl.constexpr,
    TMA_W: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    APPLY_ROUTER_WEIGHT: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """`w2_kernel` for experts so narrow that BLOCK_SIZE_K >= K: there is no loop over
    K.

    Instead a program keeps its pairs and takes BLOCKS blocks of BLOCK_SIZE_N columns in
    turn, so that the next block's weights arrive while this one is written. Bytes and
    operations are those of `w2_kernel`, but pairs are read once for each BLOCKS blocks.
    """
    wait_for_inputs(PDL)
    num_groups = tl.cdiv(end_n - first_n, BLOCK_SIZE_N * BLOCKS)
    tile = tl.program_id(0) // num_groups
    start_n = first_n + tl.program_id(0) % num_groups * (BLOCK_SIZE_N * BLOCKS)
    if tile >= tl.load(num_tiles_ptr):
        return
    expert, rows, pairs = _pairs_of(
        tile, tile_experts_ptr, sorted_pairs_ptr, BLOCK_SIZE_M
    )
    is_pair = pairs < num_pairs
    k = tl.arange(0, BLOCK_SIZE_K)
    a_mask = is_pair[:, None] & (k < size_k)[None, :]
    a_tile = tl.load(hq_ptr + rows[:, None] * size_k + k[None, :], mask=a_mask, other=0)
    h_scale = tl.load(h_scale_ptr + rows, mask=is_pair, other=0.0)
    if APPLY_ROUTER_WEIGHT:
        weight = tl.load(topk_weights_ptr + pairs, mask=is_pair, other=0.0)
        weight = _along_a(weight.to(tl.float32), SWAP_AB)
    y_rows = y_ptr + _along_a(pairs.to(tl.int64), SWAP_AB) * (end_n - first_n)
    for n0 in tl.range(
        start_n,
        tl.minimum(start_n + BLOCK_SIZE_N * BLOCKS, end_n),
        BLOCK_SIZE_N,
        num_stages=STAGES,
    ):
        n = n0 + tl.arange(0, BLOCK_SIZE_N)
        w_rows = expert * size_n + tl.minimum(n, size_n - 1)
        if TMA_W:
            w_tile = w2.load([(expert * size_n + n0).to(tl.int32), 0])
        else:
            w_ptrs = w2 + w_rows[:, None] * size_k + k[None, :]
            w_tile = tl.load(w_ptrs, mask=(k < size_k)[None, :], other=0)
        if SWAP_AB:
            sums = tl.dot(w_tile, a_tile.T, out_dtype=tl.int32)
        else:
            sums = tl.dot(a_tile, w_tile.T, out_dtype=tl.int32)
        y = _scale(sums, h_scale, w2_scale_ptr, w_rows, expert, SWAP_AB, PER_CHANNEL)
        if HAS_BIAS:
            y += _along_w(tl.load(bias_ptr + w_rows).to(tl.float32), SWAP_AB)
        if APPLY_ROUTER_WEIGHT:
            y *= weight
        mask = _along_a(is_pair, SWAP_AB) & _along_w(n < end_n, SWAP_AB)
        y_ptrs = y_rows + _along_w(n - first_n, SWAP_AB)
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_ids"])
def sum_topk_kernel(
    y_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    out_ptr,
    num_ids,
    size_k,
    first_k,
    end_k,
    TOPK: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    HAS_EXPERT_MAP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add up each token's pairs in float32, in their order; absent experts add nothing.

    y [M * topk, end_k - first_k] to out [M, K][:, first_k:end_k]. Moves 2 K (topk + 1)
    bytes a token.
    """
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    y_columns = end_k - first_k
    columns = tl.program_id(1) * BLOCK_SIZE_K + tl.arange(0, BLOCK_SIZE_K)
    total = tl.zeros((BLOCK_SIZE_K,), tl.float32)
    # Unrolled, so that all pairs are on their way at once.
    for i in tl.static_range(0, TOPK):
        pair = token * TOPK + i
        expert = local_experts(
            topk_ids_ptr, expert_map_ptr, pair, pair >= 0, num_ids, HAS_EXPERT_MAP
        )
        mask = (columns < y_columns) & (expert >= 0)
        y = tl.load(y_ptr + pair * y_columns + columns, mask=mask, other=0.0)
        total += y.to(tl.float32)
    out = total.to(out_ptr.dtype.element_ty)
    out_ptrs = out_ptr + token * size_k + first_k + columns
    tl.store(out_ptrs, out, mask=columns < y_columns)
