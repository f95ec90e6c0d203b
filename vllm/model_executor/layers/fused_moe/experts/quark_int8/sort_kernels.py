# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Triton kernels that quantize tokens and sort pairs by expert, before the products.

A tile is BLOCK_SIZE_M pairs of one expert. Up to some thousand pairs `prepare_kernel`
does all of it; with more, count, scan and align sort.

In shapes M is num_tokens, P num_pairs, E num_experts, N size_n and K size_k.
"""

from vllm.model_executor.kernels.int8_triton import wait_for_inputs
from vllm.model_executor.layers.fused_moe.experts.quark_int8.common_kernels import (
    local_experts,
    quantize_rows,
)
from vllm.triton_utils import tl, triton


@triton.jit(do_not_specialize=["num_tokens", "num_pairs", "num_ids", "num_experts"])
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
    size_k,
    num_pairs,
    num_ids,
    num_experts,
    ALIGNERS: tl.constexpr,
    HAS_EXPERT_MAP: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    PART: tl.constexpr,
    MORE_PARTS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    STATIC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Quantize tokens and, if there are ALIGNERS, sort pairs meanwhile.

    x [M, K] float to xq [M, K] int8 and scale [M] float32; sorted pairs as
    `align_kernel` says. The first E programs sort: each looks at all pairs, PART at a
    time, counts them by expert and places those of its own.
    """
    wait_for_inputs(PDL)
    program = tl.program_id(0)
    if ALIGNERS:
        if program < num_experts:
            _align_expert(
                program,
                topk_ids_ptr,
                expert_map_ptr,
                sorted_pairs_ptr,
                tile_experts_ptr,
                num_tiles_ptr,
                num_pairs,
                num_ids,
                num_experts,
                HAS_EXPERT_MAP,
                BLOCK_SIZE_M,
                PART,
                MORE_PARTS,
                BINS,
            )
        program -= num_experts
    if program >= 0:
        rows = program * ROWS + tl.arange(0, ROWS)
        quantize_rows(
            x_ptr,
            static_scale_ptr,
            xq_ptr,
            scale_ptr,
            rows,
            rows < num_tokens,
            size_k,
            ROWS,
            BLOCK_SIZE_K,
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
    num_experts,
    HAS_EXPERT_MAP: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    PART: tl.constexpr,
    MORE_PARTS: tl.constexpr,
    BINS: tl.constexpr,
):
    """Place an expert's pairs, in their order, and pad its last tile.

    sorted_pairs [tiles * BLOCK_SIZE_M] int32, padded with num_pairs; tile_experts
    [tiles] int32; num_tiles [1] int32. Reads 4 bytes a pair, twice if there are
    MORE_PARTS of PART pairs than one.
    """
    i = tl.arange(0, PART)
    if MORE_PARTS:
        counts = tl.zeros((BINS,), tl.int32)
        for start in range(0, num_pairs, PART):
            pairs = start + i
            experts = _experts_of(
                pairs, topk_ids_ptr, expert_map_ptr, num_pairs, num_ids, HAS_EXPERT_MAP
            )
            counts += _count(experts, num_experts, BINS)
    else:
        all_experts = _experts_of(
            i, topk_ids_ptr, expert_map_ptr, num_pairs, num_ids, HAS_EXPERT_MAP
        )
        counts = _count(all_experts, num_experts, BINS)
    bins = tl.arange(0, BINS)
    tiles = tl.where(bins < num_experts, (counts + BLOCK_SIZE_M - 1) // BLOCK_SIZE_M, 0)
    if expert == 0:
        tl.store(num_tiles_ptr, tl.sum(tiles))
    count = tl.sum(tl.where(bins == expert, counts, 0))
    if count > 0:
        first_tile = tl.sum(tl.where(bins < expert, tiles, 0))
        last_tile = first_tile + tl.cdiv(count, BLOCK_SIZE_M)
        first_row = first_tile * BLOCK_SIZE_M
        if MORE_PARTS:
            row = first_row
            for start in range(0, num_pairs, PART):
                pairs = start + i
                experts = _experts_of(
                    pairs,
                    topk_ids_ptr,
                    expert_map_ptr,
                    num_pairs,
                    num_ids,
                    HAS_EXPERT_MAP,
                )
                row = _place(sorted_pairs_ptr, row, pairs, experts == expert)
        else:
            _place(sorted_pairs_ptr, first_row, i, all_experts == expert)
        padding = first_row + count + tl.arange(0, BLOCK_SIZE_M)
        mask = padding < last_tile * BLOCK_SIZE_M
        tl.store(sorted_pairs_ptr + padding, num_pairs, mask=mask)
        for start in range(first_tile, last_tile, 16):
            tile = start + tl.arange(0, 16)
            tl.store(tile_experts_ptr + tile, expert, mask=tile < last_tile)


@triton.jit
def _experts_of(
    pairs,
    topk_ids_ptr,
    expert_map_ptr,
    num_pairs,
    num_ids,
    HAS_EXPERT_MAP: tl.constexpr,
):
    """`local_experts`, and -1 beyond the last pair."""
    return local_experts(
        topk_ids_ptr, expert_map_ptr, pairs, pairs < num_pairs, num_ids, HAS_EXPERT_MAP
    )


@triton.jit
def _count(experts, num_experts, BINS: tl.constexpr):
    """Pairs of each expert, [BINS]; absent pairs go to bin num_experts."""
    return tl.histogram(tl.where(experts < 0, num_experts, experts), BINS)


@triton.jit
def _place(sorted_pairs_ptr, row, pairs, mine):
    """Put those of the pairs that are mine in rows from `row` on; return the row after
    them."""
    rows = row + tl.cumsum(mine.to(tl.int32)) - 1
    tl.store(sorted_pairs_ptr + rows, pairs, mask=mine)
    return row + tl.sum(mine.to(tl.int32))


@triton.jit(do_not_specialize=["num_pairs", "num_ids", "num_experts"])
def count_kernel(
    topk_ids_ptr,
    expert_map_ptr,
    counts_ptr,
    num_pairs,
    num_ids,
    num_experts,
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
    experts = _experts_of(
        pairs, topk_ids_ptr, expert_map_ptr, num_pairs, num_ids, HAS_EXPERT_MAP
    )
    counts = _count(experts, num_experts, BINS)
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


@triton.jit(do_not_specialize=["num_pairs", "num_ids", "num_experts"])
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
    num_experts,
    HAS_EXPERT_MAP: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    PART: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sort pairs by expert, ascending, into tiles that hold pairs of one expert each.

    A program places one part of PART pairs, in their order; the place of a pair is that
    of its expert's first tile, plus the expert's pairs in the parts before, plus those
    before it in this part, which are counted by comparing all with all. All programs
    share the rest of the work: the padding and the experts of tiles.

    sorted_pairs [tiles * BLOCK_SIZE_M] int32, padded with num_pairs; tile_experts
    [tiles] int32; num_tiles [1] int32.
    """
    wait_for_inputs(PDL)
    program = tl.program_id(0)
    first_pair = program * PART
    i = tl.arange(0, PART)
    pairs = first_pair + i
    experts = _experts_of(
        pairs, topk_ids_ptr, expert_map_ptr, num_pairs, num_ids, HAS_EXPERT_MAP
    )
    bins = tl.arange(0, BINS)
    totals = tl.load(totals_ptr + bins)
    tiles = tl.where(bins < num_experts, (totals + BLOCK_SIZE_M - 1) // BLOCK_SIZE_M, 0)
    first_tiles = tl.cumsum(tiles) - tiles

    bin = tl.where(experts < 0, 0, experts)
    rows = tl.gather(first_tiles, bin, 0) * BLOCK_SIZE_M
    rows += tl.load(before_ptr + program * BINS + bin)
    for start in range(0, PART, 32):
        j = start + tl.arange(0, 32)
        others = _experts_of(
            first_pair + j,
            topk_ids_ptr,
            expert_map_ptr,
            num_pairs,
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
    for j in range(program, BLOCK_SIZE_M, tl.num_programs(0)):
        row = first_tiles * BLOCK_SIZE_M + totals + j
        tl.store(
            sorted_pairs_ptr + row, num_pairs, mask=row < last_tiles * BLOCK_SIZE_M
        )
