# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Normalize and rotate the heads of queries and keys in one kernel.

Upstream's operator of this kind multiplies by a weight in the model's dtype; that of
Gemma's norm, which Step-3.5 has, is 1 + w in float32.
"""

from typing import Any

import torch
from vllm.model_executor.kernels.int8_triton import (
    has_pdl,
    launch,
    serves_here,
    wait_for_inputs,
)
from vllm.model_executor.kernels.quark_int8_ops import register_op
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import cdiv

_HEADS_A_PROGRAM, _NUM_WARPS = 16, 4


@triton.jit(do_not_specialize=["num_heads", "num_kv_heads"])
def qk_norm_rope_kernel(
    qkv_ptr,
    positions_ptr,
    cos_sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_ptr,
    k_ptr,
    eps,
    row_stride,
    num_heads,
    num_kv_heads,
    BLOCK_SIZE_H: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    PDL: tl.constexpr,
):
    """A token's BLOCK_SIZE_H heads, queries or keys, a program.

    A head has 2 HALF columns that are rotated, column c with c + HALF, and REST that
    are not. Reads and writes 2 (num_heads + num_kv_heads) (2 HALF + REST) bytes a
    token. Weights, positions and the table must be older than the kernel before, which
    makes qkv: they are on their way while that one ends.
    """
    D: tl.constexpr = 2 * HALF + REST
    token = tl.program_id(0).to(tl.int64)
    q_blocks = tl.cdiv(num_heads, BLOCK_SIZE_H)
    # Branches choose an offset and not a pointer: for ROCm Triton 3.6 cannot compile
    # a choice of two pointers of which one has an offset of 64 bits and one of 32.
    if tl.program_id(1) < q_blocks:
        first = tl.program_id(1) * BLOCK_SIZE_H
        heads = num_heads
        before = 0
        weight_ptr = q_weight_ptr
        out_ptr = q_ptr
    else:
        first = (tl.program_id(1) - q_blocks) * BLOCK_SIZE_H
        heads = num_kv_heads
        before = num_heads * D
        weight_ptr = k_weight_ptr
        out_ptr = k_ptr
    x_ptr = qkv_ptr + token * row_stride + before
    out_ptr += token * heads * D
    c = tl.arange(0, HALF)
    w1 = 1.0 + tl.load(weight_ptr + c).to(tl.float32)
    w2 = 1.0 + tl.load(weight_ptr + HALF + c).to(tl.float32)
    if REST:
        r = tl.arange(0, REST)
        w_rest = 1.0 + tl.load(weight_ptr + 2 * HALF + r).to(tl.float32)
    cos_sin_ptr += tl.load(positions_ptr + token) * (2 * HALF)
    cos = tl.load(cos_sin_ptr + c).to(tl.float32)[None, :]
    sin = tl.load(cos_sin_ptr + HALF + c).to(tl.float32)[None, :]
    wait_for_inputs(PDL)

    h = first + tl.arange(0, BLOCK_SIZE_H)
    mask = (h < heads)[:, None]
    offsets = h[:, None] * D + c[None, :]
    x1 = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    squares = tl.sum(x1 * x1 + x2 * x2, axis=1)
    if REST:
        rest_offsets = h[:, None] * D + 2 * HALF + r[None, :]
        rest = tl.load(x_ptr + rest_offsets, mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(rest * rest, axis=1)
    inverse = tl.rsqrt(squares / D + eps)[:, None]
    # Rounded, as upstream's norm rounds what it returns.
    dtype = out_ptr.dtype.element_ty
    x1 = (x1 * inverse * w1[None, :]).to(dtype).to(tl.float32)
    x2 = (x2 * inverse * w2[None, :]).to(dtype).to(tl.float32)
    tl.store(out_ptr + offsets, (x1 * cos - x2 * sin).to(dtype), mask=mask)
    tl.store(out_ptr + offsets + HALF, (x2 * cos + x1 * sin).to(dtype), mask=mask)
    if REST:
        rest = (rest * inverse * w_rest[None, :]).to(dtype)
        tl.store(out_ptr + rest_offsets, rest, mask=mask)


def serves(attention: Any, qkv: torch.Tensor) -> bool:
    """Whether `queries_and_keys` does what upstream does to qkv in this layer: rotates
    halves of heads by a table, in sizes that are powers of two; where kernels
    serve."""
    if not serves_here() or not attention.use_rope:
        return False
    rotary_emb = attention.rotary_emb
    if (
        not isinstance(rotary_emb, RotaryEmbedding)
        or type(rotary_emb).forward_native is not RotaryEmbedding.forward_native
    ):
        return False
    half = rotary_emb.rotary_dim // 2
    rest = rotary_emb.head_size - rotary_emb.rotary_dim
    table = rotary_emb.cos_sin_cache
    return (
        rotary_emb.is_neox_style
        and half & (half - 1) == 0
        and rest & (rest - 1) == 0
        and qkv.dim() == 2
        and qkv.dtype in (torch.bfloat16, torch.float16)
        # The kernel reads it before it waits: nothing may have to convert it just then.
        and (table.dtype, table.device) == (qkv.dtype, qkv.device)
    )


def queries_and_keys(
    attention: Any, positions: torch.Tensor, qkv: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`qk_norm_rope` with what a layer of Step-3.5's attention holds."""
    return torch.ops.quark_int8.qk_norm_rope(
        qkv,
        positions,
        attention.rotary_emb.cos_sin_cache,
        attention.q_norm.weight,
        attention.k_norm.weight,
        attention.q_norm.variance_epsilon,
        attention.num_heads,
        attention.num_kv_heads,
    )


def qk_norm_rope(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of qkv, each head normalized and then rotated.

    A head x becomes x / sqrt(mean(x**2) + eps) * (1 + weight) in float32, rounded; of
    that the first columns are rotated by the token's position in float32, column c with
    c + rotary_dim / 2, and rounded.

    Args:
        qkv: [M, (num_heads + 2 num_kv_heads) head_dim], bfloat16 or float16.
        positions: [M], integer, rows of the table.
        cos_sin_cache: [positions, rotary_dim], the cosines, then the sines; rotary_dim
            <= head_dim, half of it and what is left of a head powers of two.
        q_weight, k_weight: [head_dim].

    Returns:
        Queries [M, num_heads head_dim] and keys [M, num_kv_heads head_dim], like qkv.
    """
    q, k = _empty_heads(qkv, num_heads, num_kv_heads)
    num_tokens = qkv.shape[0]
    if num_tokens == 0:
        return q, k
    head_dim = q.shape[1] // num_heads
    rotary_dim = cos_sin_cache.shape[1]
    blocks = cdiv(num_heads, _HEADS_A_PROGRAM)
    blocks += cdiv(num_kv_heads, _HEADS_A_PROGRAM)
    launch(
        qk_norm_rope_kernel,
        (num_tokens, blocks),
        has_pdl(qkv),
        qkv,
        positions,
        cos_sin_cache,
        q_weight,
        k_weight,
        q,
        k,
        eps,
        qkv.stride(0),
        num_heads,
        num_kv_heads,
        BLOCK_SIZE_H=_HEADS_A_PROGRAM,
        HALF=rotary_dim // 2,
        REST=head_dim - rotary_dim,
        num_warps=_NUM_WARPS,
    )
    return q, k


def _empty_heads(
    qkv: torch.Tensor, num_heads: int, num_kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, columns = qkv.shape
    head_dim = columns // (num_heads + 2 * num_kv_heads)
    return (
        qkv.new_empty(num_tokens, num_heads * head_dim),
        qkv.new_empty(num_tokens, num_kv_heads * head_dim),
    )


def _qk_norm_rope_fake(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_heads(qkv, num_heads, num_kv_heads)


register_op("qk_norm_rope", qk_norm_rope, fake_impl=_qk_norm_rope_fake)
