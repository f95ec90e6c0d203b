# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The INT8 (W8A8) fused MoE for many tokens: pairs sorted into tiles of one expert.

A pair is a token and one of its experts. In order: quantize tokens and sort pairs, the
first product with the activation, quantize again, the second product, add up.
"""

from typing import Any, NamedTuple

import torch
from vllm.model_executor.kernels.int8_triton import launch, num_sms
from vllm.model_executor.layers.fused_moe.experts.quark_int8 import (
    product_kernels,
    sort_kernels,
)
from vllm.model_executor.layers.fused_moe.experts.quark_int8.tensors import (
    Experts,
    Routing,
)
from vllm.model_executor.layers.fused_moe.experts.quark_int8.tiles import (
    Config,
    Product,
)
from vllm.utils.math_utils import cdiv, next_power_of_2

# Pairs that one program of the sorting kernels places. Where there are fewer pairs, and
# fewer pairs times experts, each expert's program looks at all of them instead, so many
# at a time: that is one launch in place of four.
_PART = 256
_MOST_PAIRS, _MOST_LOOKS = 16384, 1 << 22
_PAIRS_AT_A_TIME = 4096

# What pairs' outputs may take before their sum: 4096 tokens of top 8, hidden size 4096.
# Each part reads the int8 pairs again, and takes whole tiles.
_PART_BYTES = 256 << 20
_PART_COLUMNS = 512


class Tiles(NamedTuple):
    """Pairs in the order of their experts; the device alone knows how many tiles."""

    sorted_pairs: torch.Tensor  # [max_tiles * BLOCK_SIZE_M] int32, padded with P
    experts: torch.Tensor  # [max_tiles] int32, of each tile
    num_tiles: torch.Tensor  # [1] int32; what lies beyond so many is undefined


class Quantized(NamedTuple):
    """Rows of int8, [M, K], and their float32 scales, [M]."""

    rows: torch.Tensor
    scale: torch.Tensor


def apply_many_tokens(
    config: Config,
    x: torch.Tensor,
    experts: Experts,
    routing: Routing,
    out: torch.Tensor,
) -> None:
    """`layer.apply_experts` with the given tiles; tensors are contiguous.

    Takes memory of torch's allocator and not of vLLM's workspace, whose parts would all
    lie beside each other: here the second product is written over the first.
    """
    num_pairs = routing.topk_ids.numel()
    # Largest first: torch's allocator gives smaller tensors parts of a block that would
    # have held a larger one, and what outlives this layer would keep it cut.
    # The first product is read for the last time before the second is written.
    max_tiles = most_tiles(num_pairs, experts.num_experts, config.block_size_m)
    rows = max_tiles * config.block_size_m
    columns = columns_at_once(num_pairs, experts.hidden_size, x.element_size())
    memory = x.new_empty(max(rows * experts.width, num_pairs * columns))
    h = memory[: rows * experts.width].view(rows, experts.width)
    hq = _empty_quantized(rows, experts.width, x)
    tiles, xq = sort_pairs(config, x, experts, routing)
    _apply_w13(config, xq, experts, routing, tiles, h)
    _quantize_pairs(config, h, experts, tiles, num_pairs, hq)
    for start in range(0, experts.hidden_size, columns):
        end = min(start + columns, experts.hidden_size)
        y = memory[: num_pairs * (end - start)].view(num_pairs, end - start)
        _apply_w2(config, hq, experts, routing, tiles, start, y)
        _add_up(config, y, experts, routing, start, out)


def columns_at_once(num_pairs: int, hidden_size: int, element_size: int) -> int:
    """Columns of the second product that are made, and added up, before the next ones:
    as many as take _PART_BYTES for all pairs, in steps of _PART_COLUMNS."""
    most = _PART_BYTES // (num_pairs * element_size) // _PART_COLUMNS
    return min(hidden_size, max(most, 1) * _PART_COLUMNS)


def most_tiles(num_pairs: int, num_experts: int, block_size_m: int) -> int:
    """An upper bound of the number of tiles, which the device alone knows."""
    return min(num_pairs, num_pairs // block_size_m + min(num_experts, num_pairs))


def sort_options(num_pairs: int, num_experts: int) -> dict[str, Any]:
    """Of `prepare_kernel`: whether it sorts, how many pairs a program looks at at a
    time, and whether there are more."""
    sorts = num_pairs <= _MOST_PAIRS and num_pairs * num_experts <= _MOST_LOOKS
    part = max(next_power_of_2(num_pairs), 128) if sorts else 0
    return dict(
        ALIGNERS=sorts,
        PART=min(part, _PAIRS_AT_A_TIME),
        MORE_PARTS=part > _PAIRS_AT_A_TIME,
    )


def sort_pairs(
    config: Config, x: torch.Tensor, experts: Experts, routing: Routing
) -> tuple[Tiles, Quantized]:
    """Sort pairs into tiles of one expert each, and quantize tokens x meanwhile."""
    num_tokens, hidden_size = x.shape
    num_pairs, num_experts = routing.topk_ids.numel(), experts.num_experts
    max_tiles = most_tiles(num_pairs, num_experts, config.block_size_m)

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=x.device)

    tiles = Tiles(empty(max_tiles * config.block_size_m), empty(max_tiles), empty(1))
    xq = _empty_quantized(num_tokens, hidden_size, x)
    bins = max(next_power_of_2(num_experts + 1), 128)
    block_size_k = next_power_of_2(hidden_size)
    rows = max(1, 4096 // block_size_k)
    programs = cdiv(num_tokens, rows)
    how_to_sort = sort_options(num_pairs, num_experts)
    sorts = how_to_sort["ALIGNERS"]
    ids = (routing.topk_ids, routing.expert_map)
    sizes = (num_pairs, routing.num_ids(experts), num_experts)
    has_map = routing.expert_map is not None
    launch(
        sort_kernels.prepare_kernel,
        (programs + (num_experts if sorts else 0),),
        config.pdl,
        x,
        experts.a13_scale,
        *xq,
        *ids,
        *tiles,
        num_tokens,
        hidden_size,
        *sizes,
        HAS_EXPERT_MAP=has_map,
        BLOCK_SIZE_M=config.block_size_m,
        BINS=bins,
        ROWS=rows,
        BLOCK_SIZE_K=block_size_k,
        STATIC=experts.a13_scale is not None,
        num_warps=8,
        **how_to_sort,
    )
    if sorts:
        return tiles, xq

    num_parts = cdiv(num_pairs, _PART)
    counts, before, totals = empty(num_parts, bins), empty(num_parts, bins), empty(bins)
    common: dict[str, Any] = dict(HAS_EXPERT_MAP=has_map, PART=_PART, BINS=bins)
    launch(
        sort_kernels.count_kernel,
        (num_parts,),
        config.pdl,
        *ids,
        counts,
        *sizes,
        num_warps=4,
        **common,
    )
    launch(
        sort_kernels.scan_kernel,
        (bins // 16,),
        config.pdl,
        counts,
        before,
        totals,
        num_parts,
        PARTS=128,
        BINS=bins,
        BLOCK=16,
        num_warps=4,
    )
    launch(
        sort_kernels.align_kernel,
        (num_parts,),
        config.pdl,
        *ids,
        before,
        totals,
        *tiles,
        *sizes,
        BLOCK_SIZE_M=config.block_size_m,
        num_warps=8,
        **common,
    )
    return tiles, xq


def _empty_quantized(rows: int, columns: int, like: torch.Tensor) -> Quantized:
    return Quantized(
        like.new_empty((rows, columns), dtype=torch.int8),
        like.new_empty(rows, dtype=torch.float32),
    )


def _apply_w13(
    config: Config,
    xq: Quantized,
    experts: Experts,
    routing: Routing,
    tiles: Tiles,
    h: torch.Tensor,
) -> None:
    """The first product and the activation, to h [tiles * BLOCK_SIZE_M, N]."""
    product, width, hidden_size = config.w13, experts.width, experts.hidden_size
    if product.persistent:
        assert product.groups in (1, 2)
        kernel = _hopper().w13_kernel
        options = _persistent_options(product) | dict(GROUPS=product.groups)
        w13 = _hopper().make_tma_descriptor(
            experts.w13.view(-1, hidden_size),
            product.block_size_w // 2,
            product.block_size_k,
        )
    else:
        kernel = product_kernels.w13_kernel
        options = _stepping_options(product, hidden_size)
        w13 = _paired_tma_descriptor(experts.w13, product)
    launch(
        kernel,
        (_programs(product, tiles, 2 * width, h),),
        config.pdl,
        *xq,
        w13,
        experts.w13_scale,
        experts.w13_bias,
        *tiles,
        h,
        routing.topk_ids.numel(),
        width,
        hidden_size,
        routing.topk,
        BLOCK_SIZE_M=config.block_size_m,
        BLOCK_SIZE_N=product.block_size_w // 2,
        BLOCK_SIZE_K=product.block_size_k,
        PER_CHANNEL=experts.w13_scale.numel() != experts.num_experts,
        HAS_BIAS=experts.w13_bias is not None,
        SWIGLUSTEP_LIMIT=experts.swiglustep_limit,
        num_warps=product.num_warps,
        **options,
    )


def _quantize_pairs(
    config: Config,
    h: torch.Tensor,
    experts: Experts,
    tiles: Tiles,
    num_pairs: int,
    hq: Quantized,
) -> None:
    rows, width = h.shape
    block_size_k = next_power_of_2(width)
    rows_a_program = max(1, 8192 // block_size_k)
    launch(
        product_kernels.quantize_pairs_kernel,
        (cdiv(rows, rows_a_program),),
        config.pdl,
        h,
        experts.a2_scale,
        tiles.sorted_pairs,
        tiles.num_tiles,
        *hq,
        num_pairs,
        width,
        BLOCK_SIZE_M=config.block_size_m,
        ROWS=rows_a_program,
        BLOCK_SIZE_K=block_size_k,
        STATIC=experts.a2_scale is not None,
        num_warps=4,
    )


def _apply_w2(
    config: Config,
    hq: Quantized,
    experts: Experts,
    routing: Routing,
    tiles: Tiles,
    start: int,
    y: torch.Tensor,
) -> None:
    """Columns of the second product from `start` on, to y [P, columns]."""
    product, width, hidden_size = config.w2, experts.width, experts.hidden_size
    num_columns = y.shape[1]
    columns_a_program = product.block_size_w
    if product.persistent:
        assert product.groups == 2
        kernel, options = _hopper().w2_kernel, _persistent_options(product)
        make_tma_descriptor = _hopper().make_tma_descriptor
    else:
        make_tma_descriptor = _tma_descriptor
        if product.blocks:
            assert not product.tma_a
            kernel = product_kernels.w2_narrow_kernel
            columns_a_program *= product.blocks
            options = dict(
                BLOCKS=product.blocks,
                SWAP_AB=product.swap_ab,
                TMA_W=product.tma_w,
                STAGES=product.num_stages,
            )
        else:
            kernel = product_kernels.w2_kernel
            options = _stepping_options(product, width) | dict(TMA_A=product.tma_a)
    pairs, w2 = hq.rows, experts.w2
    if product.tma_a:
        pairs = make_tma_descriptor(pairs, config.block_size_m, product.block_size_k)
    if product.tma_w:
        w2 = make_tma_descriptor(
            w2.view(-1, width), product.block_size_w, product.block_size_k
        )
    launch(
        kernel,
        (_programs(product, tiles, num_columns, y, columns_a_program),),
        config.pdl,
        pairs,
        hq.scale,
        w2,
        experts.w2_scale,
        experts.w2_bias,
        routing.topk_weights,
        *tiles,
        y,
        routing.topk_ids.numel(),
        hidden_size,
        width,
        start,
        start + num_columns,
        BLOCK_SIZE_M=config.block_size_m,
        BLOCK_SIZE_N=product.block_size_w,
        BLOCK_SIZE_K=product.block_size_k,
        PER_CHANNEL=experts.w2_scale.numel() != experts.num_experts,
        HAS_BIAS=experts.w2_bias is not None,
        APPLY_ROUTER_WEIGHT=routing.apply_router_weight,
        num_warps=product.num_warps,
        **options,
    )


def _add_up(
    config: Config,
    y: torch.Tensor,
    experts: Experts,
    routing: Routing,
    start: int,
    out: torch.Tensor,
) -> None:
    """Each token's sum over its pairs, to out [M, K] from column `start` on."""
    num_columns = y.shape[1]
    # Of all columns, not of a part: one kernel serves every number of tokens.
    block_size_k = min(next_power_of_2(experts.hidden_size), 1024)
    launch(
        product_kernels.sum_topk_kernel,
        (out.shape[0], cdiv(num_columns, block_size_k)),
        config.pdl,
        y,
        routing.topk_ids,
        routing.expert_map,
        out,
        routing.num_ids(experts),
        experts.hidden_size,
        start,
        start + num_columns,
        TOPK=routing.topk,
        BLOCK_SIZE_K=block_size_k,
        HAS_EXPERT_MAP=routing.expert_map is not None,
        num_warps=4,
    )


def _programs(
    product: Product,
    tiles: Tiles,
    num_columns: int,
    x: torch.Tensor,
    columns_a_program: int | None = None,
) -> int:
    """One for each tile and block of columns; persistent ones take turns."""
    columns_a_program = columns_a_program or product.block_size_w
    programs = tiles.experts.numel() * cdiv(num_columns, columns_a_program)
    if product.persistent:
        programs = min(programs, product.ctas_per_sm * num_sms(x))
    return programs


def _stepping_options(product: Product, size_k: int) -> dict[str, Any]:
    """Of the Triton kernels that step over K."""
    return dict(
        EVEN_K=size_k % product.block_size_k == 0,
        SWAP_AB=product.swap_ab,
        TMA_W=product.tma_w,
        num_stages=product.num_stages,
    )


def _persistent_options(product: Product) -> dict[str, Any]:
    """Of the Gluon kernels."""
    options = dict(STAGES=product.num_stages, NUM_WARPS=product.num_warps)
    # A step's buffer is free when the next product has been asked for.
    assert product.num_stages > 1
    if product.ctas_per_sm > 1:
        assert product.groups == 1
        # Of 65,536; as many warps copy, at most, as multiply.
        options["maxnreg"] = 1024 // (product.ctas_per_sm * product.num_warps)
    return options


def _hopper() -> Any:
    # Imported late: there is no Gluon without Triton, or with an older one.
    from vllm.model_executor.layers.fused_moe.experts.quark_int8 import hopper_kernels

    return hopper_kernels


def _tma_descriptor(matrix: torch.Tensor, block_rows: int, block_size_k: int) -> Any:
    """Of a matrix, in boxes of block_rows by block_size_k."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows, k = matrix.shape
    return TensorDescriptor(matrix, [rows, k], [k, 1], [block_rows, block_size_k])


def _paired_tma_descriptor(w13: torch.Tensor, product: Product) -> Any:
    """Of w13, in boxes that hold a gate row, its up row, the next gate row; w13 itself
    where the product reads no boxes.

    Row r, whatever its expert, has the row N further down beside it.
    """
    if not product.tma_w:
        return w13
    from triton.tools.tensor_descriptor import TensorDescriptor

    num_experts, rows, k = w13.shape
    n = rows // 2
    shape = [num_experts * rows - n, 2, k]
    block = [product.block_size_w // 2, 2, product.block_size_k]
    return TensorDescriptor(w13, shape, [k, n * k, 1], block)
