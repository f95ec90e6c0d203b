# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Pieces that Triton kernels of the INT8 (W8A8) fused MoE share.

A pair is a token and one of its `topk` experts; there are P = M * topk, and pair p is
of token p // topk.
"""

from vllm.model_executor.kernels.int8_triton import quantize, quantize_static
from vllm.triton_utils import tl, triton


@triton.jit
def activate(gate, up, SWIGLUSTEP_LIMIT: tl.constexpr):
    """silu(gate) * up; with a limit, both factors are clipped first."""
    gate = gate / (1.0 + tl.exp(-gate))
    if SWIGLUSTEP_LIMIT is not None:
        gate = tl.minimum(gate, SWIGLUSTEP_LIMIT)
        up = tl.clamp(up, -SWIGLUSTEP_LIMIT, SWIGLUSTEP_LIMIT)
    return gate * up


@triton.jit
def local_experts(
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
def quantize_rows(
    x_ptr,
    static_scale_ptr,
    xq_ptr,
    scale_ptr,
    rows,
    is_row,
    size_k,
    ROWS: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    STATIC: tl.constexpr,
):
    """Quantize rows [ROWS] of x [rows, K], each with its own scale or all with one.

    Moves 3 K bytes a row (2 in, 1 out). ROWS x BLOCK_SIZE_K is a tile, BLOCK_SIZE_K >=
    K.
    """
    columns = tl.arange(0, BLOCK_SIZE_K)
    offsets = rows.to(tl.int64)[:, None] * size_k + columns[None, :]
    mask = is_row[:, None] & (columns < size_k)[None, :]
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
