# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Triton kernels of the INT8 (W8A8) fused MoE.

A pair is a token and one of its `topk` experts; there are P = M * topk, and pair p is
of token p // topk. Tiles are BLOCK_M pairs of one expert. Pairs lie in tile order in
everything between sorting and `w2_kernel`; padding rows are never written or read as
results.

With many tokens: prepare (quantizes and sorts; with more pairs count, scan and align
sort), w13 (with the activation), quantize_pairs, w2 or w2_narrow, sum_topk. With few:
w13_few and w2_few alone, which quantize for themselves.

Integer sums are exact, each value is quantized, scaled and rounded by itself, and the
sums over experts are taken in one order, without atomics: the same input gives the same
bits.
"""

from vllm.model_executor.kernels.int8_triton import (
    dot4,
    pack4,
    quantize,
    quantize_static,
    quantize_token,
    wait_for_inputs,
)
from vllm.triton_utils import tl, triton


@triton.jit
def _activate(gate, up, SWIGLUSTEP_LIMIT: tl.constexpr):
    """silu(gate) * up; with a limit, both factors are clipped first."""
    gate = gate / (1.0 + tl.exp(-gate))
    if SWIGLUSTEP_LIMIT is not None:
        gate = tl.minimum(gate, SWIGLUSTEP_LIMIT)
        up = tl.clamp(up, -SWIGLUSTEP_LIMIT, SWIGLUSTEP_LIMIT)
    return gate * up


@triton.jit
def _local_experts(
    topk_ids_ptr, expert_map_ptr, pairs, mask, num_ids, HAS_EXPERT_MAP: tl.constexpr
):
    """Each pair's expert on this rank, -1 where it is absent or the id is no expert."""
    ids = tl.load(topk_ids_ptr + pairs, mask=mask, other=-1).to(tl.int32)
    known = (ids >= 0) & (ids < num_ids)
    if HAS_EXPERT_MAP:
        experts = tl.load(expert_map_ptr + ids, mask=known, other=-1).to(tl.int32)
    else:
        experts = tl.where(known, ids, -1)
    return experts


@triton.jit
def _quantize_rows(
    x_ptr,
    static_scale_ptr,
    xq_ptr,
    scale_ptr,
    rows,
    is_row,
    K,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STATIC: tl.constexpr,
):
    """Quantize rows [ROWS] of x [rows, K], each with its own scale or all with one.

    Moves 3 K bytes a row (2 in, 1 out). ROWS x BLOCK_K is a tile, BLOCK_K >= K.
    """
    columns = tl.arange(0, BLOCK_K)
    offsets = rows.to(tl.int64)[:, None] * K + columns[None, :]
    mask = is_row[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if STATIC:
        scale = tl.zeros((ROWS,), tl.float32) + tl.load(static_scale_ptr)
        xq = quantize_static(x, scale[:, None]).to(tl.int8)
    else:
        absmax = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-10)
        scale = tl.div_rn(absmax, 127.0)
        xq = quantize(x, absmax[:, None]).to(tl.int8)
    tl.store(xq_ptr + offsets, xq, mask=mask)
    tl.store(scale_ptr + rows, scale, mask=is_row)


@triton.jit(do_not_specialize=["num_pairs"])
def quantize_pairs_kernel(
    h_ptr,
    static_scale_ptr,
    sorted_pairs_ptr,
    num_tiles_ptr,
    hq_ptr,
    scale_ptr,
    num_pairs,
    K,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STATIC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Quantize the rows of tiles that hold a pair.

    h [tiles * BLOCK_M, K] float to hq, int8, and scale [tiles * BLOCK_M] float32.
    """
    wait_for_inputs(PDL)
    start = tl.program_id(0) * ROWS
    if start >= tl.load(num_tiles_ptr) * BLOCK_M:
        return
    rows = start + tl.arange(0, ROWS)
    is_row = rows < tl.load(num_tiles_ptr) * BLOCK_M
    is_row = tl.load(sorted_pairs_ptr + rows, mask=is_row, other=num_pairs) < num_pairs
    _quantize_rows(
        h_ptr,
        static_scale_ptr,
        hq_ptr,
        scale_ptr,
        rows,
        is_row,
        K,
        ROWS,
        BLOCK_K,
        STATIC,
    )


@triton.jit(do_not_specialize=["num_tokens", "num_pairs", "num_ids", "E"])
def prepare_kernel(
    x_ptr,
    static_scale_ptr,
    xq_ptr,
    scale_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    sorted_pairs_ptr,
    tile_experts_ptr,
    num_tiles_ptr,
    num_tokens,
    K,
    num_pairs,
    num_ids,
    E,
    ALIGNERS: tl.constexpr,
    HAS_EXPERT_MAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAIRS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STATIC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Quantize tokens and, if there are ALIGNERS, sort up to PAIRS pairs meanwhile.

    x [M, K] float to xq [M, K] int8 and scale [M] float32; sorted pairs as
    `align_kernel` says. The first E programs sort: each looks at all pairs, counts them
    by expert and places those of its own.
    """
    wait_for_inputs(PDL)
    program = tl.program_id(0)
    if ALIGNERS:
        if program < E:
            _align_expert(
                program,
                topk_ids_ptr,
                expert_map_ptr,
                sorted_pairs_ptr,
                tile_experts_ptr,
                num_tiles_ptr,
                num_pairs,
                num_ids,
                E,
                HAS_EXPERT_MAP,
                BLOCK_M,
                PAIRS,
                BINS,
            )
        program -= E
    if program >= 0:
        rows = program * ROWS + tl.arange(0, ROWS)
        _quantize_rows(
            x_ptr,
            static_scale_ptr,
            xq_ptr,
            scale_ptr,
            rows,
            rows < num_tokens,
            K,
            ROWS,
            BLOCK_K,
            STATIC,
        )


@triton.jit
def _align_expert(
    expert,
    topk_ids_ptr,
    expert_map_ptr,
    sorted_pairs_ptr,
    tile_experts_ptr,
    num_tiles_ptr,
    num_pairs,
    num_ids,
    E,
    HAS_EXPERT_MAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAIRS: tl.constexpr,
    BINS: tl.constexpr,
):
    """Place an expert's pairs, in their order, and pad its last tile."""
    pairs = tl.arange(0, PAIRS)
    experts = _local_experts(
        topk_ids_ptr,
        expert_map_ptr,
        pairs,
        pairs < num_pairs,
        num_ids,
        HAS_EXPERT_MAP,
    )
    bins = tl.arange(0, BINS)
    counts = tl.histogram(tl.where(experts < 0, E, experts), BINS)
    tiles = tl.where(bins < E, (counts + BLOCK_M - 1) // BLOCK_M, 0)
    if expert == 0:
        tl.store(num_tiles_ptr, tl.sum(tiles))
    count = tl.sum(tl.where(bins == expert, counts, 0))
    if count > 0:
        first_tile = tl.sum(tl.where(bins < expert, tiles, 0))
        last_tile = first_tile + tl.cdiv(count, BLOCK_M)
        mine = experts == expert
        rows = first_tile * BLOCK_M + tl.cumsum(mine.to(tl.int32)) - 1
        tl.store(sorted_pairs_ptr + rows, pairs, mask=mine)
        padding = first_tile * BLOCK_M + count + tl.arange(0, BLOCK_M)
        mask = padding < last_tile * BLOCK_M
        tl.store(sorted_pairs_ptr + padding, num_pairs, mask=mask)
        for start in range(first_tile, last_tile, 16):
            tile = start + tl.arange(0, 16)
            tl.store(tile_experts_ptr + tile, expert, mask=tile < last_tile)


@triton.jit(do_not_specialize=["num_pairs", "num_ids", "E"])
def count_kernel(
    topk_ids_ptr,
    expert_map_ptr,
    counts_ptr,
    num_pairs,
    num_ids,
    E,
    HAS_EXPERT_MAP: tl.constexpr,
    PART: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Count, in each part of PART pairs, the pairs of each expert.

    counts [parts, BINS] int32; absent pairs go to bin E. Reads 4 bytes a pair.
    """
    wait_for_inputs(PDL)
    part = tl.program_id(0)
    pairs = part * PART + tl.arange(0, PART)
    experts = _local_experts(
        topk_ids_ptr,
        expert_map_ptr,
        pairs,
        pairs < num_pairs,
        num_ids,
        HAS_EXPERT_MAP,
    )
    counts = tl.histogram(tl.where(experts < 0, E, experts), BINS)
    tl.store(counts_ptr + part * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["num_parts"])
def scan_kernel(
    counts_ptr,
    before_ptr,
    totals_ptr,
    num_parts,
    PARTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add up counts [parts, BINS] over the parts before each, and over all of them.

    before [parts, BINS] and totals [BINS], int32. PARTS x BLOCK is a tile.
    """
    wait_for_inputs(PDL)
    bins = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    totals = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        offsets = parts[:, None] * BINS + bins[None, :]
        mask = (parts < num_parts)[:, None]
        counts = tl.load(counts_ptr + offsets, mask=mask, other=0)
        before = tl.cumsum(counts, axis=0) - counts + totals[None, :]
        tl.store(before_ptr + offsets, before, mask=mask)
        totals += tl.sum(counts, axis=0)
    tl.store(totals_ptr + bins, totals)


@triton.jit(do_not_specialize=["num_pairs", "num_ids", "num_parts", "E"])
def align_kernel(
    topk_ids_ptr,
    expert_map_ptr,
    before_ptr,
    totals_ptr,
    sorted_pairs_ptr,
    tile_experts_ptr,
    num_tiles_ptr,
    num_pairs,
    num_ids,
    E,
    HAS_EXPERT_MAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PART: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sort pairs by expert, ascending, into tiles that hold pairs of one expert each.

    A program places one part of PART pairs, in their order; the place of a pair is that
    of its expert's first tile, plus the expert's pairs in the parts before, plus those
    before it in this part, which are counted by comparing all with all. All programs
    share the rest of the work: the padding and the experts of tiles.

    sorted_pairs [tiles * BLOCK_M] int32, padded with num_pairs; tile_experts [tiles]
    int32; num_tiles [1] int32.
    """
    wait_for_inputs(PDL)
    program = tl.program_id(0)
    first_pair = program * PART
    i = tl.arange(0, PART)
    pairs = first_pair + i
    experts = _local_experts(
        topk_ids_ptr,
        expert_map_ptr,
        pairs,
        pairs < num_pairs,
        num_ids,
        HAS_EXPERT_MAP,
    )
    bins = tl.arange(0, BINS)
    totals = tl.load(totals_ptr + bins)
    tiles = tl.where(bins < E, (totals + BLOCK_M - 1) // BLOCK_M, 0)
    first_tiles = tl.cumsum(tiles) - tiles

    bin = tl.where(experts < 0, 0, experts)
    rows = tl.gather(first_tiles, bin, 0) * BLOCK_M
    rows += tl.load(before_ptr + program * BINS + bin)
    for start in range(0, PART, 32):
        j = start + tl.arange(0, 32)
        others = _local_experts(
            topk_ids_ptr,
            expert_map_ptr,
            first_pair + j,
            first_pair + j < num_pairs,
            num_ids,
            HAS_EXPERT_MAP,
        )
        earlier = (others[None, :] == experts[:, None]) & (j[None, :] < i[:, None])
        rows += tl.sum(earlier.to(tl.int32), axis=1)
    tl.store(sorted_pairs_ptr + rows, pairs, mask=experts >= 0)

    last_tiles = first_tiles + tiles
    num_tiles = tl.sum(tiles)
    if program == 0:
        tl.store(num_tiles_ptr, num_tiles)
    for start in range(program * 16, num_tiles, tl.num_programs(0) * 16):
        tile = start + tl.arange(0, 16)
        expert = tl.sum((last_tiles[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        tl.store(tile_experts_ptr + tile, expert, mask=tile < num_tiles)
    for j in range(program, BLOCK_M, tl.num_programs(0)):
        row = first_tiles * BLOCK_M + totals + j
        tl.store(sorted_pairs_ptr + row, num_pairs, mask=row < last_tiles * BLOCK_M)


@triton.jit
def _product(
    a,
    a_rows,
    a_row,
    a_mask,
    w,
    w_rows,
    w_row,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    TMA_A: tl.constexpr,
    TMA_W: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rows of a times rows of w, exact in int32.

    Args:
        a: int8, rows of K: a pointer, with a_rows [BLOCK_M] int64 and a_mask [BLOCK_M],
            or a descriptor of boxes, with a_row the first row.
        w: the same, with w_rows [BLOCK_W] or w_row.

    Returns:
        [BLOCK_M, BLOCK_W], or transposed with SWAP: then w fills the rows of the tensor
        cores, of which they have at least 64, and a the columns, of which 8 will do.
    """
    k = tl.arange(0, BLOCK_K)
    if not TMA_A:
        a_ptrs = a + a_rows[:, None] * K + k[None, :]
    if not TMA_W:
        w_ptrs = w + w_rows[:, None] * K + k[None, :]
    if SWAP:
        sums = tl.zeros((BLOCK_W, BLOCK_M), tl.int32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_W), tl.int32)
    for k0 in range(0, K, BLOCK_K):
        if TMA_A:
            a_tile = a.load([a_row, k0])
        elif EVEN_K:
            a_tile = tl.load(a_ptrs, mask=a_mask[:, None], other=0)
        else:
            in_k = (k < K - k0)[None, :]
            a_tile = tl.load(a_ptrs, mask=a_mask[:, None] & in_k, other=0)
        if TMA_W:
            if INTERLEAVED:
                w_tile = w.load([w_row, 0, k0]).reshape(BLOCK_W, BLOCK_K)
            else:
                w_tile = w.load([w_row, k0])
        elif EVEN_K:
            w_tile = tl.load(w_ptrs)
        else:
            w_tile = tl.load(w_ptrs, mask=(k < K - k0)[None, :], other=0)
        if SWAP:
            sums = tl.dot(w_tile, a_tile.T, sums, out_dtype=tl.int32)
        else:
            sums = tl.dot(a_tile, w_tile.T, sums, out_dtype=tl.int32)
        if not TMA_A:
            a_ptrs += BLOCK_K
        if not TMA_W:
            w_ptrs += BLOCK_K
    return sums


@triton.jit
def _along_a(values, SWAP: tl.constexpr):
    """[BLOCK_M] in the place it has in what `_product` returns."""
    return values[None, :] if SWAP else values[:, None]


@triton.jit
def _along_w(values, SWAP: tl.constexpr):
    """[BLOCK_W] in the place it has in what `_product` returns."""
    return values[:, None] if SWAP else values[None, :]


@triton.jit
def _scale(
    sums,
    a_scale,
    w_scale_ptr,
    w_rows,
    expert,
    SWAP: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
):
    """sums, as from `_product`, times a_scale [BLOCK_M] and the weights' scales."""
    a_scale = _along_a(a_scale, SWAP)
    if PER_CHANNEL:
        scale = a_scale * _along_w(tl.load(w_scale_ptr + w_rows), SWAP)
    else:
        scale = a_scale * tl.load(w_scale_ptr + expert)
    return sums.to(tl.float32) * scale


@triton.jit
def _pairs_of(tile, tile_experts_ptr, sorted_pairs_ptr, BLOCK_M: tl.constexpr):
    """A tile's expert, rows [BLOCK_M] and pairs [BLOCK_M]."""
    expert = tl.load(tile_experts_ptr + tile).to(tl.int64)
    rows = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return expert, rows, tl.load(sorted_pairs_ptr + rows)


@triton.jit(do_not_specialize=["num_pairs", "topk"])
def w13_kernel(
    xq_ptr,
    x_scale_ptr,
    w13,
    w13_scale_ptr,
    bias_ptr,
    topk_weights_ptr,
    sorted_pairs_ptr,
    tile_experts_ptr,
    num_tiles_ptr,
    h_ptr,
    num_pairs,
    N,
    K,
    topk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    TMA_W: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGH: tl.constexpr,
    SWIGLUSTEP_LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Gate and up projection of each pair and the activation of both.

    h [tiles * BLOCK_M, N] = act(xq @ w13.T), in the model's dtype. A tile is BLOCK_M
    pairs by BLOCK_N columns of both gate and up, so that the activation needs no memory
    traffic. Neighbouring programs share the pairs.

    Reads 2 N K bytes an expert, and its pairs' K bytes once for each BLOCK_N columns
    (from L2); writes 2 N bytes a pair. 4 N K operations a pair.
    """
    wait_for_inputs(PDL)
    num_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // num_n
    n0 = tl.program_id(0) % num_n * BLOCK_N
    if tile >= tl.load(num_tiles_ptr):
        return
    expert, rows, pairs = _pairs_of(tile, tile_experts_ptr, sorted_pairs_ptr, BLOCK_M)
    is_pair = pairs < num_pairs
    tokens = (pairs // topk).to(tl.int64)
    n = n0 + tl.arange(0, BLOCK_N)
    w_rows = expert * 2 * N + tl.minimum(n, N - 1)
    # Gate and up of a column are neighbours, so that one thread holds both.
    j = tl.arange(0, 2 * BLOCK_N)
    sums = _product(
        xq_ptr,
        tokens,
        0,
        is_pair,
        w13,
        expert * 2 * N + tl.minimum(n0 + j // 2, N - 1) + j % 2 * N,
        (expert * 2 * N + n0).to(tl.int32),
        K,
        BLOCK_M,
        2 * BLOCK_N,
        BLOCK_K,
        EVEN_K,
        SWAP,
        False,
        TMA_W,
        True,
    )
    if SWAP:
        sums = tl.permute(sums.reshape(BLOCK_N, 2, BLOCK_M), (0, 2, 1))
    else:
        sums = sums.reshape(BLOCK_M, BLOCK_N, 2)
    gate_sums, up_sums = tl.split(sums)
    x_scale = tl.load(x_scale_ptr + tokens, mask=is_pair, other=0.0)
    gate = _scale(gate_sums, x_scale, w13_scale_ptr, w_rows, expert, SWAP, PER_CHANNEL)
    up = _scale(up_sums, x_scale, w13_scale_ptr, w_rows + N, expert, SWAP, PER_CHANNEL)
    if HAS_BIAS:
        gate += _along_w(tl.load(bias_ptr + w_rows).to(tl.float32), SWAP)
        up += _along_w(tl.load(bias_ptr + w_rows + N).to(tl.float32), SWAP)
    if WEIGH:
        weight = tl.load(topk_weights_ptr + pairs, mask=is_pair, other=0.0)
        gate *= _along_a(weight.to(tl.float32), SWAP)
        up *= _along_a(weight.to(tl.float32), SWAP)
    h = _activate(gate, up, SWIGLUSTEP_LIMIT)
    h_ptrs = h_ptr + _along_a(rows, SWAP) * N + _along_w(n, SWAP)
    mask = _along_a(is_pair, SWAP) & _along_w(n < N, SWAP)
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
    N,
    K,
    first_n,
    end_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    TMA_A: tl.constexpr,
    TMA_W: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Down projection of each pair, scattered back to the order of pairs.

    y [P, end_n - first_n] = (hq @ w2.T)[:, first_n:end_n], weighted by the router with
    WEIGH, in the model's dtype. Here N counts the output's columns, the model's hidden
    size, and K the expert's width. A tile is BLOCK_M pairs by BLOCK_N columns.

    Reads N K bytes an expert, and its pairs' K bytes once for each BLOCK_N columns
    (from L2); writes 2 N bytes a pair. 2 N K operations a pair.
    """
    wait_for_inputs(PDL)
    num_n = tl.cdiv(end_n - first_n, BLOCK_N)
    tile = tl.program_id(0) // num_n
    n0 = first_n + tl.program_id(0) % num_n * BLOCK_N
    if tile >= tl.load(num_tiles_ptr):
        return
    expert, rows, pairs = _pairs_of(tile, tile_experts_ptr, sorted_pairs_ptr, BLOCK_M)
    is_pair = pairs < num_pairs
    n = n0 + tl.arange(0, BLOCK_N)
    w_rows = expert * N + tl.minimum(n, N - 1)
    sums = _product(
        hq,
        rows,
        tile * BLOCK_M,
        is_pair,
        w2,
        w_rows,
        (expert * N + n0).to(tl.int32),
        K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
        SWAP,
        TMA_A,
        TMA_W,
        False,
    )
    h_scale = tl.load(h_scale_ptr + rows, mask=is_pair, other=0.0)
    y = _scale(sums, h_scale, w2_scale_ptr, w_rows, expert, SWAP, PER_CHANNEL)
    if HAS_BIAS:
        y += _along_w(tl.load(bias_ptr + w_rows).to(tl.float32), SWAP)
    if WEIGH:
        weight = tl.load(topk_weights_ptr + pairs, mask=is_pair, other=0.0)
        y *= _along_a(weight.to(tl.float32), SWAP)
    y_rows = y_ptr + _along_a(pairs.to(tl.int64), SWAP) * (end_n - first_n)
    y_ptrs = y_rows + _along_w(n - first_n, SWAP)
    mask = _along_a(is_pair, SWAP) & _along_w(n < end_n, SWAP)
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
    N,
    K,
    first_n,
    end_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    SWAP: tl.constexpr,
    TMA_W: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGH: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """`w2_kernel` for experts so narrow that BLOCK_K >= K: there is no loop over K.

    Instead a program keeps its pairs and takes BLOCKS blocks of BLOCK_N columns in
    turn, so that the next block's weights arrive while this one is written. Bytes and
    operations are those of `w2_kernel`, but pairs are read once for each BLOCKS blocks.
    """
    wait_for_inputs(PDL)
    num_groups = tl.cdiv(end_n - first_n, BLOCK_N * BLOCKS)
    tile = tl.program_id(0) // num_groups
    start_n = first_n + tl.program_id(0) % num_groups * (BLOCK_N * BLOCKS)
    if tile >= tl.load(num_tiles_ptr):
        return
    expert, rows, pairs = _pairs_of(tile, tile_experts_ptr, sorted_pairs_ptr, BLOCK_M)
    is_pair = pairs < num_pairs
    k = tl.arange(0, BLOCK_K)
    a_mask = is_pair[:, None] & (k < K)[None, :]
    a_tile = tl.load(hq_ptr + rows[:, None] * K + k[None, :], mask=a_mask, other=0)
    h_scale = tl.load(h_scale_ptr + rows, mask=is_pair, other=0.0)
    if WEIGH:
        weight = tl.load(topk_weights_ptr + pairs, mask=is_pair, other=0.0)
        weight = _along_a(weight.to(tl.float32), SWAP)
    y_rows = y_ptr + _along_a(pairs.to(tl.int64), SWAP) * (end_n - first_n)
    for n0 in tl.range(
        start_n,
        tl.minimum(start_n + BLOCK_N * BLOCKS, end_n),
        BLOCK_N,
        num_stages=STAGES,
    ):
        n = n0 + tl.arange(0, BLOCK_N)
        w_rows = expert * N + tl.minimum(n, N - 1)
        if TMA_W:
            w_tile = w2.load([(expert * N + n0).to(tl.int32), 0])
        else:
            w_ptrs = w2 + w_rows[:, None] * K + k[None, :]
            w_tile = tl.load(w_ptrs, mask=(k < K)[None, :], other=0)
        if SWAP:
            sums = tl.dot(w_tile, a_tile.T, out_dtype=tl.int32)
        else:
            sums = tl.dot(a_tile, w_tile.T, out_dtype=tl.int32)
        y = _scale(sums, h_scale, w2_scale_ptr, w_rows, expert, SWAP, PER_CHANNEL)
        if HAS_BIAS:
            y += _along_w(tl.load(bias_ptr + w_rows).to(tl.float32), SWAP)
        if WEIGH:
            y *= weight
        mask = _along_a(is_pair, SWAP) & _along_w(n < end_n, SWAP)
        y_ptrs = y_rows + _along_w(n - first_n, SWAP)
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_ids"])
def sum_topk_kernel(
    y_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    out_ptr,
    num_ids,
    K,
    first_k,
    end_k,
    TOPK: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K,), tl.float32)
    # Unrolled, so that all pairs are on their way at once.
    for i in tl.static_range(0, TOPK):
        pair = token * TOPK + i
        expert = _local_experts(
            topk_ids_ptr, expert_map_ptr, pair, pair >= 0, num_ids, HAS_EXPERT_MAP
        )
        mask = (columns < y_columns) & (expert >= 0)
        y = tl.load(y_ptr + pair * y_columns + columns, mask=mask, other=0.0)
        total += y.to(tl.float32)
    out = total.to(out_ptr.dtype.element_ty)
    out_ptrs = out_ptr + token * K + first_k + columns
    tl.store(out_ptrs, out, mask=columns < y_columns)


@triton.jit
def _load_gate_up(w_ptr, n, N, words, BLOCK_K: tl.constexpr):
    """Rows n of an expert's gate and up projections, in words of four int8."""
    k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * words + k[None, :]
    mask = (n < N)[:, None] & (k < words)[None, :]
    w_gate = tl.load(w_ptrs, mask=mask, other=0)
    w_up = tl.load(w_ptrs + N.to(tl.int64) * words, mask=mask, other=0)
    return w_gate, w_up


@triton.jit(do_not_specialize=["num_ids", "topk"])
def w13_few_kernel(
    x_ptr,
    x_static_scale_ptr,
    w13_ptr,
    w13_scale_ptr,
    bias_ptr,
    topk_weights_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    h_ptr,
    num_ids,
    N,
    K,
    topk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_EXPERT_MAP: tl.constexpr,
    STATIC_X: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGH: tl.constexpr,
    SWIGLUSTEP_LIMIT: tl.constexpr,
    DOT4: tl.constexpr,
    TURNS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """`w13_kernel` for a few tokens: each program multiplies one pair's whole row.

    x [M, K] and w13 [E, 2N, K], both read as whole words of four int8, to h [P, N] in
    the dtype of x. A program that takes one block of rows asks for its weights before
    it quantizes the token: their addresses need nothing but the routing. BLOCK_K >=
    K / 4 counts words.
    """
    pair = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    words = K // 4
    wait_for_inputs(PDL)
    expert = _local_experts(
        topk_ids_ptr, expert_map_ptr, pair, pair >= 0, num_ids, HAS_EXPERT_MAP
    ).to(tl.int64)
    if expert < 0:
        return
    w13_ptr += expert * 2 * N * words
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if not TURNS:
        w_gate, w_up = _load_gate_up(w13_ptr, n, N, words, BLOCK_K)
    token = pair // topk
    x_offsets = token.to(tl.int64) * K + k[:, None] * 4 + tl.arange(0, 4)[None, :]
    x = tl.load(x_ptr + x_offsets, mask=(k < words)[:, None], other=0.0).to(tl.float32)
    xq, x_scale = quantize_token(x, x_static_scale_ptr, STATIC_X)
    xq = tl.broadcast_to(xq[None, :], (BLOCK_N, BLOCK_K))
    zeros = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    if WEIGH:
        weight = tl.load(topk_weights_ptr + pair).to(tl.float32)

    for n0 in tl.range(
        tl.program_id(0) * BLOCK_N,
        N,
        tl.num_programs(0) * BLOCK_N,
        num_stages=STAGES,
    ):
        n = n0 + tl.arange(0, BLOCK_N)
        rows = expert * 2 * N + n
        if TURNS:
            w_gate, w_up = _load_gate_up(w13_ptr, n, N, words, BLOCK_K)
        gate = tl.sum(dot4(w_gate, xq, zeros, DOT4), axis=1).to(tl.float32)
        up = tl.sum(dot4(w_up, xq, zeros, DOT4), axis=1).to(tl.float32)
        if PER_CHANNEL:
            gate *= x_scale * tl.load(w13_scale_ptr + rows, mask=n < N, other=0.0)
            up *= x_scale * tl.load(w13_scale_ptr + rows + N, mask=n < N, other=0.0)
        else:
            w_scale = tl.load(w13_scale_ptr + expert)
            gate *= x_scale * w_scale
            up *= x_scale * w_scale
        if HAS_BIAS:
            gate += tl.load(bias_ptr + rows, mask=n < N, other=0.0).to(tl.float32)
            up += tl.load(bias_ptr + rows + N, mask=n < N, other=0.0).to(tl.float32)
        if WEIGH:
            gate *= weight
            up *= weight
        h = _activate(gate, up, SWIGLUSTEP_LIMIT).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + pair.to(tl.int64) * N + n, h, mask=n < N)


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
    N,
    K,
    topk,
    TOPK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_EXPERT_MAP: tl.constexpr,
    STATIC_H: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGH: tl.constexpr,
    DOT4: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """`w2_kernel` and `sum_topk_kernel` for a few tokens.

    h [P, K] and w2 [E, N, K] to out [M, N]; here N counts the output's columns and K
    the expert's width. A program multiplies all of a token's pairs for BLOCK_N columns
    and adds them up. The weights' addresses need only the routing, which is older than
    the kernel before, so they are on their way while that one ends. BLOCK_K >= K / 4
    counts words, TOPK >= topk pairs.
    """
    token = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    words = K // 4
    j = tl.arange(0, TOPK)
    pairs = token * topk + j
    experts = _local_experts(
        topk_ids_ptr, expert_map_ptr, pairs, j < topk, num_ids, HAS_EXPERT_MAP
    ).to(tl.int64)
    present = experts >= 0
    wait_for_inputs(PDL)
    h_offsets = (
        pairs.to(tl.int64)[:, None, None] * K
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
    # Pairs and columns make one dimension: row r is column r % BLOCK_N of its pair.
    hq = tl.broadcast_to(hq[:, None, :], (TOPK, BLOCK_N, BLOCK_K))
    hq = hq.reshape(TOPK * BLOCK_N, BLOCK_K)
    zeros = tl.zeros((TOPK * BLOCK_N, BLOCK_K), tl.int32)
    row_experts = tl.broadcast_to(experts[:, None], (TOPK, BLOCK_N))
    row_experts = row_experts.reshape(TOPK * BLOCK_N)
    column = tl.arange(0, TOPK * BLOCK_N) % BLOCK_N
    if not PER_CHANNEL:
        h_scale *= tl.load(w2_scale_ptr + experts, mask=present, other=0.0)
    if WEIGH:
        weight = tl.load(topk_weights_ptr + pairs, mask=present, other=0.0)
        weight = weight.to(tl.float32)

    for n0 in tl.range(
        tl.program_id(0) * BLOCK_N,
        N,
        tl.num_programs(0) * BLOCK_N,
        num_stages=STAGES,
    ):
        n = n0 + tl.arange(0, BLOCK_N)
        rows = experts[:, None] * N + n[None, :]
        row_mask = present[:, None] & (n < N)[None, :]
        w_ptrs = w2_ptr + (row_experts * N + n0 + column)[:, None] * words + k[None, :]
        w_mask = (row_experts >= 0) & (n0 + column < N)
        w = tl.load(w_ptrs, mask=w_mask[:, None] & (k < words)[None, :], other=0)
        y = tl.sum(dot4(w, hq, zeros, DOT4), axis=1).to(tl.float32)
        y = y.reshape(TOPK, BLOCK_N)
        if PER_CHANNEL:
            w_scale = tl.load(w2_scale_ptr + rows, mask=row_mask, other=0.0)
            y *= h_scale[:, None] * w_scale
        else:
            y *= h_scale[:, None]
        if HAS_BIAS:
            y += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)
        if WEIGH:
            y *= weight[:, None]
        y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
        total = tl.sum(tl.where(row_mask, y, 0.0), axis=0)
        out_ptrs = out_ptr + token.to(tl.int64) * N + n
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=n < N)
