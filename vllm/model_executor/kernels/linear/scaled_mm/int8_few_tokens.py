# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""INT8 (W8A8) linear layers for a few tokens, in Triton.

With few tokens a linear layer takes as long as its weights take to arrive. A tile of
the tensor cores is mostly padding then, and too few tiles are on their way at a time.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import vllm.envs as envs
from vllm import _custom_ops as ops
from vllm.logger import init_logger
from vllm.model_executor.kernels.int8_triton import (
    dot4,
    has_dot4,
    has_pdl,
    launch,
    num_sms,
    quantize_token,
    serves_here,
    wait_for_inputs,
)
from vllm.model_executor.kernels.linear.scaled_mm.cutlass import (
    CutlassInt8ScaledMMLinearKernel,
)
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
    Int8ScaledMMLinearKernel,
    Int8ScaledMMLinearLayerConfig,
)
from vllm.model_executor.kernels.linear.scaled_mm.triton import (
    TritonInt8ScaledMMLinearKernel,
)
from vllm.model_executor.kernels.quark_int8_ops import register_op
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import cdiv, next_power_of_2

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearBase

logger = init_logger(__name__)

# With more tokens each reading the weights costs more than tensor cores do: a weight
# that is large, and any other.
MOST_TOKENS = 2, 4
_LARGE_BYTES = 16 << 20
# Words of four int8 that a program multiplies at a time; they lie in registers.
_WORDS = 16384


@dataclass(frozen=True)
class Tiles:
    """How a layer is cut: a program takes block_size_n whole rows of the weight at a
    time, and `ctas_per_sm` of them on a multiprocessor take turns."""

    block_size_n: int
    num_warps: int
    ctas_per_sm: int


@triton.jit
def _load_rows(w_ptr, n, k, size_n, words):
    mask = (n < size_n)[:, None] & (k < words)[None, :]
    return tl.load(
        w_ptr + n.to(tl.int64)[:, None] * words + k[None, :], mask=mask, other=0
    )


@triton.jit
def int8_linear_kernel(
    x_ptr,
    x_static_scale_ptr,
    gate_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    out_ptr,
    size_n,
    size_k,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    STATIC: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT4: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [M, K] quantized, times w [N, K], to out [M, N].

    With HEAD_DIM, a multiple of 4, the columns of each head are multiplied before with
    the sigmoid of its gate [M, K / HEAD_DIM].

    A program has one token and takes blocks of BLOCK_SIZE_N rows in turn. It asks for
    its next block while it multiplies one, and for the first before the kernel before
    has ended: weights need nothing of it. x and w are read as whole words of four int8,
    which BLOCK_SIZE_K >= K / 4 counts.

    Reads N K bytes a token, from L2 but for the first token, and 2 K bytes a program;
    writes 2 N bytes. 2 N K operations a token.
    """
    token = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK_SIZE_K)
    words = size_k // 4
    n = tl.program_id(0) * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    w = _load_rows(w_ptr, n, k, size_n, words)
    wait_for_inputs(PDL)
    x_offsets = token * size_k + k[:, None] * 4 + tl.arange(0, 4)[None, :]
    x = tl.load(x_ptr + x_offsets, mask=(k < words)[:, None], other=0.0).to(tl.float32)
    if HEAD_DIM:
        head = k * 4 // HEAD_DIM
        gate = tl.load(
            gate_ptr + token * (size_k // HEAD_DIM) + head, mask=k < words, other=0.0
        )
        x *= tl.sigmoid(gate.to(tl.float32))[:, None]
    xq, x_scale = quantize_token(x, x_static_scale_ptr, STATIC)
    xq = tl.broadcast_to(xq[None, :], (BLOCK_SIZE_N, BLOCK_SIZE_K))
    zeros = tl.zeros((BLOCK_SIZE_N, BLOCK_SIZE_K), tl.int32)
    step = tl.num_programs(0) * BLOCK_SIZE_N
    for _ in range(tl.program_id(0) * BLOCK_SIZE_N, size_n, step):
        following = _load_rows(w_ptr, n + step, k, size_n, words)
        out = tl.sum(dot4(w, xq, zeros, DOT4), axis=1).to(tl.float32)
        if PER_CHANNEL:
            out *= tl.load(w_scale_ptr + n, mask=n < size_n, other=0.0)
        else:
            out *= tl.load(w_scale_ptr)
        out *= x_scale
        if HAS_BIAS:
            out += tl.load(bias_ptr + n, mask=n < size_n, other=0.0).to(tl.float32)
        out = out.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + token * size_n + n, out, mask=n < size_n)
        w = following
        n += step


@triton.jit
def gate_and_quantize_kernel(
    x_ptr,
    x_static_scale_ptr,
    gate_ptr,
    xq_ptr,
    scale_ptr,
    size_k,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    STATIC: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [M, K] times the sigmoid of its heads' gate [M, K / HEAD_DIM], quantized.

    To xq [M, K] int8 and, unless STATIC, scale [M] float32. A program has a token;
    BLOCK_SIZE_K >= K / 4 words of four. Moves 3 K bytes a token.
    """
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_SIZE_K)
    mask = (
        k < size_k // 4
    )  # in this form Triton sees that four words are stored at once
    offsets = k[:, None] * 4 + tl.arange(0, 4)[None, :]
    wait_for_inputs(PDL)
    x = tl.load(x_ptr + token * size_k + offsets, mask=mask[:, None], other=0.0)
    gate_row = gate_ptr + token * (size_k // HEAD_DIM)
    gate = tl.load(gate_row + k * 4 // HEAD_DIM, mask=mask, other=0.0)
    x = x.to(tl.float32) * tl.sigmoid(gate.to(tl.float32))[:, None]
    words, scale = quantize_token(x, x_static_scale_ptr, STATIC)
    tl.store(xq_ptr + token * (size_k // 4) + k, words, mask=mask)
    if not STATIC:
        tl.store(scale_ptr + token, scale)


def choose_tiles(num_tokens: int, num_rows: int, num_columns: int) -> Tiles | None:
    """For x [M, K] and a weight [N, K]; None where there are too many tokens, or a row
    does not lie in registers or end with a vector that a thread reads."""
    is_large = num_rows * num_columns > _LARGE_BYTES
    if not 0 < num_tokens <= MOST_TOKENS[0 if is_large else 1]:
        return None
    words = next_power_of_2(num_columns) // 4
    if words > _WORDS or num_columns % 16:
        return None
    if words <= 1024:
        return Tiles(min(4096 // words, 8), 8, 4)
    return Tiles(max(8192 // words, 1), 8, 2)


def run_int8_linear(
    tiles: Tiles,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """`int8_linear` for x [M, K] and weight [N, K], both contiguous."""
    num_tokens, num_columns = x.shape
    num_rows = weight.shape[0]
    out = x.new_empty(num_tokens, num_rows)
    most = tiles.ctas_per_sm * num_sms(x) // num_tokens
    programs = min(cdiv(num_rows, tiles.block_size_n), max(1, most))
    launch(
        int8_linear_kernel,
        (programs, num_tokens),
        has_pdl(x),
        x,
        input_scale,
        gate,
        weight.view(torch.int32),
        weight_scale,
        bias,
        out,
        num_rows,
        num_columns,
        HEAD_DIM=0 if gate is None else num_columns // gate.shape[1],
        BLOCK_SIZE_N=tiles.block_size_n,
        BLOCK_SIZE_K=next_power_of_2(num_columns) // 4,
        STATIC=input_scale is not None,
        PER_CHANNEL=weight_scale.numel() != 1,
        HAS_BIAS=bias is not None,
        DOT4=has_dot4(x),
        num_warps=tiles.num_warps,
    )
    return out


def run_gate_and_quantize(
    x: torch.Tensor, input_scale: torch.Tensor | None, gate: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] times the sigmoid of gate [M, heads], both contiguous: int8, and scales
    [M, 1] float32 or input_scale."""
    num_tokens, num_columns = x.shape
    xq = torch.empty_like(x, dtype=torch.int8)
    scale = x.new_empty((num_tokens, 1), dtype=torch.float32)
    launch(
        gate_and_quantize_kernel,
        (num_tokens,),
        has_pdl(x),
        x,
        input_scale,
        gate,
        xq.view(torch.int32),
        scale,
        num_columns,
        HEAD_DIM=num_columns // gate.shape[1],
        BLOCK_SIZE_K=next_power_of_2(num_columns) // 4,
        STATIC=input_scale is not None,
        num_warps=8,
    )
    return xq, scale if input_scale is None else input_scale


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize x and multiply it with an INT8 weight.

    Args:
        x: [..., K], bfloat16 or float16.
        weight: [K, N] int8, the transpose of a contiguous [N, K].
        weight_scale: float32, per channel, N of them, or per tensor, one.
        input_scale: float32 scalar of static activations, None for dynamic per-token
            ones.
        bias: [N] or None.
        gate: [..., heads] or None: x is multiplied before with the sigmoid of its
            heads' gates, in float32. K / heads is a multiple of 4.

    Returns:
        [..., N] like x. Integer sums are exact. With few tokens, and with a gate, the
        values are quantized here: x * (127 / max(abs(x))), or x / input_scale, rounded
        once, halves to even. Else upstream's operator does that, and with many tokens
        its product follows either.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    num_rows = weight.shape[1]
    if gate is not None:
        gate = gate.reshape(-1, gate.shape[-1]).contiguous()
    tiles = choose_tiles(rows.shape[0], num_rows, rows.shape[1])
    if tiles and weight.t().is_contiguous():
        out = run_int8_linear(
            tiles, rows, weight.t(), weight_scale, input_scale, bias, gate
        )
    else:
        if gate is None:
            xq, x_scale, _ = ops.scaled_int8_quant(rows, input_scale)
        else:
            xq, x_scale = run_gate_and_quantize(rows, input_scale, gate)
        out = ops.cutlass_scaled_mm(xq, weight, x_scale, weight_scale, x.dtype, bias)
    return out.view(*x.shape[:-1], num_rows)


def _int8_linear_fake(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


register_op("int8_linear", int8_linear, fake_impl=_int8_linear_fake)


class FewTokensInt8ScaledMMLinearKernel(CutlassInt8ScaledMMLinearKernel):
    """Upstream's kernel for CUDA, with another for few tokens; see
    docs/design/int8-linear.md.

    On ROCm its operator for more tokens calls upstream's Triton kernel.
    """

    @classmethod
    def is_supported(
        cls, compute_capability: int | None = None
    ) -> tuple[bool, str | None]:
        if not serves_here():
            return False, "was measured on Hopper; VLLM_QUARK_INT8_KERNELS=on tries it."
        if envs.VLLM_BATCH_INVARIANT:
            return False, "rounds halves as upstream's kernels for more tokens do not."
        if CutlassInt8ScaledMMLinearKernel.__name__ in envs.VLLM_DISABLED_KERNELS:
            return False, "calls CUTLASS for more tokens, which is disabled."
        return True, None

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        if not c.input_symmetric:
            return False, "requires symmetric activations."
        return True, None

    def apply_weights(
        self,
        layer: "LinearBase",
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        weight, weight_scale, input_scale, _, _ = self._get_layer_params(layer)
        return torch.ops.quark_int8.int8_linear(
            x, weight, weight_scale, input_scale, bias
        )


# Kernels of upstream's that upstream's operator stands for: CUTLASS, or on ROCm Triton.
_CALLED = (CutlassInt8ScaledMMLinearKernel, TritonInt8ScaledMMLinearKernel)


def few_tokens_kernel() -> type[FewTokensInt8ScaledMMLinearKernel] | None:
    """The kernel for Quark's layers to force, None where it does not serve.

    It stands in no list of upstream's: layers of other formats keep their kernel, whose
    quantization rounds halves otherwise.
    """
    supported, _ = FewTokensInt8ScaledMMLinearKernel.is_supported()
    return FewTokensInt8ScaledMMLinearKernel if supported else None


def or_few_tokens(chosen: Int8ScaledMMLinearKernel) -> Int8ScaledMMLinearKernel:
    """The kernel for one of Quark's layers, in the place of the one of upstream's that
    it calls for more tokens; what else was chosen stays."""
    kernel = few_tokens_kernel()
    if (
        kernel is None
        or type(chosen) not in _CALLED
        or kernel.__name__ in envs.VLLM_DISABLED_KERNELS
        or not kernel.can_implement(chosen.config)[0]
    ):
        return chosen
    logger.info_once("Using %s for Quark's INT8 linear layers.", kernel.__name__)
    return kernel(chosen.config, list(chosen.layer_param_names))
