# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The router of an MoE layer in Triton: its product in float32, and its choice.

Upstream computes a float32 product without tensor cores, and chooses among a number of
experts that is no power of two with a kernel that looks at all of them for each choice.
"""

from dataclasses import dataclass
from typing import Any

import torch
import vllm.envs as envs
from vllm.model_executor.kernels.int8_triton import (
    has_pdl,
    launch,
    serves_here,
    wait_for_inputs,
)
from vllm.model_executor.kernels.quark_int8_ops import register_op
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import cdiv, next_power_of_2

# Numbers of experts that are no power of two, but known to upstream's fast kernel.
_KNOWN_TO_UPSTREAM = (192, 320, 384, 448, 576)
_MOST_EXPERTS = 1024
# Four rows of the weight fit into a program's registers.
_MOST_FEW_COLUMNS = 4096
_SPLIT_BLOCK = 2048


@dataclass(frozen=True)
class FewTiles:
    """How the product of few tokens is cut: whole rows, of the weight and of tokens."""

    block_size_m: int
    block_size_e: int
    num_warps: int


@dataclass(frozen=True)
class Tiles:
    """How the product of many tokens is cut, for tensor cores."""

    block_size_m: int
    block_size_e: int
    block_size_k: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["num_tokens"])
def router_few_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    num_tokens,
    num_experts,
    size_k,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_E: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [M, K] times w [E, K] float32, to out [M, E] float32; BLOCK_SIZE_K >= K.

    Reads K (4 E M / BLOCK_SIZE_M + 2 M E / BLOCK_SIZE_E) bytes, of which 4 E K from
    memory. The weight is on its way before the kernel before has ended.
    """
    m = tl.program_id(1) * BLOCK_SIZE_M
    e = tl.program_id(0) * BLOCK_SIZE_E + tl.arange(0, BLOCK_SIZE_E)
    k = tl.arange(0, BLOCK_SIZE_K)
    mask = (e < num_experts)[:, None] & (k < size_k)[None, :]
    w = tl.load(w_ptr + e[:, None] * size_k + k[None, :], mask=mask, other=0.0)
    wait_for_inputs(PDL)
    for i in tl.static_range(BLOCK_SIZE_M):
        token = (m + i).to(tl.int64)
        x = tl.load(
            x_ptr + token * size_k + k,
            mask=(k < size_k) & (m + i < num_tokens),
            other=0.0,
        )
        sums = tl.sum(w * x.to(tl.float32)[None, :], axis=1)
        tl.store(
            out_ptr + token * num_experts + e,
            sums,
            mask=(e < num_experts) & (m + i < num_tokens),
        )


@triton.jit
def split_weight_kernel(w_ptr, parts_ptr, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """w [size] float32 as a sum of three bfloat16, to parts [3, size].

    A float32 has 24 bits, a bfloat16 eight: the sum is exact. Moves 10 bytes a number.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + i, mask=i < size, other=0.0)
    high = w.to(tl.bfloat16)
    w -= high.to(tl.float32)
    middle = w.to(tl.bfloat16)
    low = (w - middle.to(tl.float32)).to(tl.bfloat16)
    wait_for_inputs(PDL)
    tl.store(parts_ptr + i, high, mask=i < size)
    tl.store(parts_ptr + size + i, middle, mask=i < size)
    tl.store(parts_ptr + 2 * size + i, low, mask=i < size)


@triton.jit(do_not_specialize=["num_tokens"])
def router_kernel(
    x_ptr,
    parts_ptr,
    out_ptr,
    num_tokens,
    num_experts,
    size_k,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_E: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    OPERAND: tl.constexpr,
    PDL: tl.constexpr,
):
    """`router_few_kernel` for x bfloat16 and many tokens, on tensor cores.

    The weight comes as parts [3, E, K], of `split_weight_kernel`, whose products with x
    are exact in float32. Tensor cores cut bits off when they add up: they do so for one
    step of K alone, smallest parts first; steps are added as any float32. 6 M E K
    operations; reads K (2 M E / BLOCK_SIZE_E + 6 E M / BLOCK_SIZE_M) bytes, mostly from
    L2. OPERAND is bfloat16, but float32 in the interpreter, which does not multiply it.
    """
    num_e = tl.cdiv(num_experts, BLOCK_SIZE_E)
    m = tl.program_id(0) // num_e * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    e = tl.program_id(0) % num_e * BLOCK_SIZE_E + tl.arange(0, BLOCK_SIZE_E)
    k = tl.arange(0, BLOCK_SIZE_K)
    x_ptrs = (
        x_ptr
        + tl.minimum(m, num_tokens - 1).to(tl.int64)[:, None] * size_k
        + k[None, :]
    )
    high_ptrs = (
        parts_ptr + tl.minimum(e, num_experts - 1)[:, None] * size_k + k[None, :]
    )
    sums = tl.zeros((BLOCK_SIZE_E, BLOCK_SIZE_M), tl.float32)
    wait_for_inputs(PDL)
    for k0 in range(0, size_k, BLOCK_SIZE_K):
        in_k = (k < size_k - k0)[None, :]
        x = tl.load(x_ptrs, mask=in_k, other=0.0).to(OPERAND).T
        high = tl.load(high_ptrs, mask=in_k, other=0.0).to(OPERAND)
        middle = tl.load(high_ptrs + num_experts * size_k, mask=in_k, other=0.0).to(
            OPERAND
        )
        low = tl.load(high_ptrs + 2 * num_experts * size_k, mask=in_k, other=0.0).to(
            OPERAND
        )
        step = tl.dot(low, x)
        step = tl.dot(middle, x, step)
        sums += tl.dot(high, x, step)
        x_ptrs += BLOCK_SIZE_K
        high_ptrs += BLOCK_SIZE_K
    out_ptrs = out_ptr + m.to(tl.int64)[None, :] * num_experts + e[:, None]
    tl.store(
        out_ptrs, sums, mask=(m < num_tokens)[None, :] & (e < num_experts)[:, None]
    )


@triton.jit(do_not_specialize=["num_tokens"])
def topk_sigmoid_kernel(
    topk_weights_ptr,
    topk_ids_ptr,
    token_expert_indices_ptr,
    gating_output_ptr,
    bias_ptr,
    num_tokens,
    num_experts,
    topk,
    routed_scaling_factor,
    TOPK: tl.constexpr,
    BLOCK_SIZE_E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """What upstream's operator of this name does, a token a program.

    TOPK >= topk and BLOCK_SIZE_E >= E. Moves 4 E + 12 topk bytes a token.
    """
    token = tl.program_id(0)
    e = tl.arange(0, BLOCK_SIZE_E)
    j = tl.arange(0, TOPK)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + e, mask=e < num_experts, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    logits = tl.load(
        gating_output_ptr + token.to(tl.int64) * num_experts + e,
        mask=e < num_experts,
        other=0.0,
    ).to(tl.float32)
    scores = 1.0 / (1.0 + tl.exp(-logits))
    choice = scores
    if HAS_BIAS:
        choice += bias
    # NaN compares with nothing: it would let what is beyond E win.
    choice = tl.where((e < num_experts) & (choice == choice), choice, float("-inf"))
    weights = tl.zeros((TOPK,), tl.float32)
    ids = tl.zeros((TOPK,), tl.int32)
    for i in range(0, topk):
        best = tl.argmax(choice, axis=0, tie_break_left=True)
        chosen = e == best
        weight = tl.sum(tl.where(chosen, scores, 0.0), axis=0)
        weights = tl.where(j == i, weight, weights)
        ids = tl.where(j == i, best, ids)
        choice = tl.where(chosen, float("-inf"), choice)
    if RENORMALIZE:
        # Scores that have all underflowed to zero stay zero.
        weights /= tl.maximum(tl.sum(weights, axis=0), 1.1754943508222875e-38)
    weights *= routed_scaling_factor
    out = token.to(tl.int64) * topk + j
    tl.store(topk_weights_ptr + out, weights, mask=j < topk)
    tl.store(topk_ids_ptr + out, ids, mask=j < topk)
    tl.store(token_expert_indices_ptr + out, j * num_tokens + token, mask=j < topk)


def serves_product(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `router_logits` computes x [M, K] times weight [E, K]: where kernels
    serve, unless a token's logits are not to depend on the batch."""
    return (
        serves_here()
        and not envs.VLLM_BATCH_INVARIANT
        and x.dtype == torch.bfloat16
        and weight.dtype == torch.float32
        and x.shape[-1] == weight.shape[-1]
    )


def serves_gate(gate: Any, x: torch.Tensor) -> bool:
    """`serves_product` for upstream's GateLinear, unless that has a kernel of its own
    for so few tokens, as from 0.33.0 on: the two were not measured side by side."""
    has_own = getattr(gate, "allow_ll_fp32w_gemm", False)
    if has_own and x.shape[0] <= gate.FP32_MAX_TOKENS:
        return False
    return serves_product(x, gate.weight)


def serves_choice(gating_output: torch.Tensor) -> bool:
    """Whether `topk_sigmoid` chooses of gating_output [M, E]: where kernels serve,
    among numbers of experts for which upstream's kernel reads all scores again for each
    choice."""
    num_experts = gating_output.shape[1]
    return (
        serves_here()
        and num_experts & (num_experts - 1) != 0
        and num_experts not in _KNOWN_TO_UPSTREAM
        and num_experts <= _MOST_EXPERTS
    )


def choose_tiles(num_tokens: int, hidden_size: int) -> FewTiles | Tiles | None:
    """Tiles for x [M, K], from a sweep on an H200 with 288 x 4096.

    None where cuBLAS was faster: between few tokens and enough for all multiprocessors.
    """
    if num_tokens <= 64 and hidden_size <= _MOST_FEW_COLUMNS:
        return FewTiles(1 if num_tokens <= 2 else 2 if num_tokens <= 8 else 4, 4, 4)
    if num_tokens < 1024:
        return None
    return Tiles(64 if num_tokens < 2048 else 128, 64, 64, 4, 3)


def run_product(
    tiles: FewTiles | Tiles, x: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """`router_logits` with these tiles."""
    num_tokens, hidden_size = x.shape
    num_experts = weight.shape[0]
    out = x.new_empty((num_tokens, num_experts), dtype=torch.float32)
    blocks = cdiv(num_tokens, tiles.block_size_m)
    expert_blocks = cdiv(num_experts, tiles.block_size_e)
    kernel: Any
    grid: tuple[int, ...]
    options: dict[str, Any]
    if isinstance(tiles, FewTiles):
        kernel, grid = router_few_kernel, (expert_blocks, blocks)
        options = dict(BLOCK_SIZE_K=next_power_of_2(hidden_size))
    else:
        parts = x.new_empty((3, num_experts, hidden_size), dtype=torch.bfloat16)
        launch(
            split_weight_kernel,
            (cdiv(weight.numel(), _SPLIT_BLOCK),),
            has_pdl(x),
            weight,
            parts,
            weight.numel(),
            BLOCK=_SPLIT_BLOCK,
            num_warps=4,
        )
        weight = parts
        kernel, grid = router_kernel, (blocks * expert_blocks,)
        options = dict(
            BLOCK_SIZE_K=tiles.block_size_k,
            OPERAND=tl.bfloat16 if x.is_cuda else tl.float32,
            num_stages=tiles.num_stages,
        )
    launch(
        kernel,
        grid,
        has_pdl(x),
        x,
        weight,
        out,
        num_tokens,
        num_experts,
        hidden_size,
        BLOCK_SIZE_M=tiles.block_size_m,
        BLOCK_SIZE_E=tiles.block_size_e,
        num_warps=tiles.num_warps,
        **options,
    )
    return out


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The router's logits, as exact as a float32 product.

    Args:
        x: [M, K] bfloat16.
        weight: [E, K] float32, contiguous.

    Returns:
        [M, E] float32.
    """
    num_tokens, hidden_size = x.shape
    if num_tokens == 0:
        return x.new_empty((0, weight.shape[0]), dtype=torch.float32)
    tiles = choose_tiles(num_tokens, hidden_size)
    if tiles is None:
        return torch.nn.functional.linear(x.float(), weight)
    return run_product(tiles, x.contiguous(), weight)


def topk_sigmoid(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
) -> None:
    """Route each token to the experts with the highest sigmoid scores.

    The bias only moves the choice: weights are the scores without it, divided by their
    sum if `renormalize`, times `routed_scaling_factor`, which upstream's operator takes
    from 0.26.0 on. Of equal scores the lower id wins; experts come in descending order.
    A score that is NaN is never chosen; of a token that has no other, expert 0 is, with
    the weight NaN.

    Args:
        topk_weights: [M, topk] float32, written.
        topk_ids: [M, topk] integer, written.
        token_expert_indices: [M, topk] int32, written: i * M + token for choice i.
        gating_output: [M, E], float: the router's logits.
        e_score_correction_bias: [E], float.
    """
    num_tokens, num_experts = gating_output.shape
    topk = topk_ids.shape[1]
    if num_tokens == 0:
        return
    launch(
        topk_sigmoid_kernel,
        (num_tokens,),
        has_pdl(gating_output),
        topk_weights,
        topk_ids,
        token_expert_indices,
        gating_output.contiguous(),
        e_score_correction_bias,
        num_tokens,
        num_experts,
        topk,
        routed_scaling_factor,
        TOPK=next_power_of_2(topk),
        BLOCK_SIZE_E=next_power_of_2(num_experts),
        HAS_BIAS=e_score_correction_bias is not None,
        RENORMALIZE=renormalize,
        num_warps=1,
    )


def _router_logits_fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


def _topk_sigmoid_fake(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    e_score_correction_bias: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
) -> None:
    pass


register_op("router_logits", router_logits, fake_impl=_router_logits_fake)
register_op(
    "topk_sigmoid",
    topk_sigmoid,
    mutates_args=["topk_weights", "topk_ids", "token_expert_indices"],
    fake_impl=_topk_sigmoid_fake,
)
