# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""INT8 on any CPU: per-token quantization and exact integer products.

Not every CPU multiplies int8 exactly. Without VNNI or AMX, oneDNN uses an instruction
that adds two products in int16 and saturates, which full-range values overflow. The
products here are exact everywhere; `has_exact_int8_dot` says how they are computed.
"""

import functools

import torch
import vllm._custom_ops  # noqa: F401  # loads the operators that this CPU's build has
from torch import ops
from torch.library import Library
from vllm.model_executor.kernels.quark_int8_ops import register_op
from vllm.platforms import current_platform

# float32 holds every integer up to 2**24, so the sum of this many products of two
# int8 values is exact in it, in any order.
_EXACT_TERMS = 2**24 // (128 * 128)
# Rows of the weight that are float32 at a time; they stay in the cache.
_FLOAT_ROWS = 256

# oneDNN rearranges its right operand for each product. Rows a multiple of a page apart,
# as with 4096 input features, evict each other from the cache meanwhile: unless it pays
# off for many rows of the other operand, such a weight goes to the left.
_PAGE = 4096
_FEW_ROWS = 64
# The float32 before 1/2. Added to a float32 of up to 127, it carries halves, and
# nothing less, to the next integer; 1/2 would also carry the float32 before 1/2.
_BELOW_HALF = 0.5 - 2**-25
# Numbers of a row are equal where they differ by no more than this share of the
# largest. Else the zero point would be so large that float32 lacks its fractions.
_EQUAL = 2**-12


@functools.cache
def has_exact_int8_dot() -> bool:
    """Whether oneDNN's int8 products are exact on this CPU (VNNI, AMX).

    It is tried out, with the values that overflow most, rather than read off the CPU's
    flags: `ONEDNN_MAX_CPU_ISA` can hide an instruction set that the CPU has.
    """
    # Towers that are not to be used are built on the meta device.
    largest = torch.full((32, 64), 127, dtype=torch.int8, device="cpu")
    return bool((torch._int_mm(largest, largest.t()) == 64 * 127**2).all())


def per_token_quant_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of `x` to int8 with a scale of its own.

    Computes in float32 what upstream's Triton kernel of the same name does: the scale
    is max(abs(row)), at least 1e-10, over 127, and halves round away from zero. GPUs
    divide approximately, so a value close to a half may be one step apart there. (The
    CPU's `scaled_int8_quant` rounds halves to even, and gives zeros a scale of zero.)

    Args:
        x: [M, K], float.

    Returns:
        [M, K] int8 and scales [M, 1] float32.
    """
    x = x.float()
    absmax = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-10)
    # Not 127 / absmax: torch takes the reciprocal first, which rounds twice.
    x = x * (torch.full_like(absmax, 127) / absmax)
    # The conversion drops the fraction.
    return (x.sign() * _BELOW_HALF + x).to(torch.int8), absmax / 127


def per_token_quant_int8_asymmetric(
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize each row of `x` to int8 with a scale and a zero point of its own.

    The scale is (max(row) - min(row)) / 255, the zero point -128 - min(row) / scale,
    and halves round to even: the steps of the CPU's `dynamic_scaled_int8_quant`, but
    for numbers within a float32 rounding of a half. That one makes zeros of a row of
    equal numbers. Such a row has no zero point here, and max(abs(row)) / 127 for a
    scale.

    Args:
        x: [M, K], float.

    Returns:
        [M, K] int8, scales [M, 1] float32 and zero points [M, 1] int32. A number of x
        is about (its int8 - the zero point) * the scale.
    """
    x = x.float()
    smallest, largest = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    absmax = torch.maximum(smallest.abs(), largest.abs())
    is_equal = largest - smallest <= absmax * _EQUAL
    of_equal = absmax.clamp(min=1e-10) / 127
    scale = torch.where(is_equal, of_equal, (largest - smallest) / 255)
    zero_point = torch.where(is_equal, 0, (-128 - smallest / scale).round())
    x_q = (x / scale + zero_point).round().clamp(-128, 127).to(torch.int8)
    return x_q, scale, zero_point.to(torch.int32)


def static_per_tensor_quant_int8(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `x` to int8 with the given scale, and zero point if there is one.

    Rounds halves to even and saturates, as `scaled_int8_quant` does everywhere.

    Args:
        x: [M, K], float.
        scale: one float32.
        zero_point: one int32.

    Returns:
        [M, K] int8 and the scale, repeated for each row, [M, 1] float32.
    """
    steps = x.float() / scale
    if zero_point is not None:
        steps = steps + zero_point
    x_q = steps.round().clamp(-128, 127).to(torch.int8)
    return x_q, scale.expand(x.shape[0], 1).contiguous()


def int8_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The exact product `a @ b.T`; `torch.ops.quark_int8.cpu_int8_mm` where compiled.

    Args:
        a: [M, K] int8, K below 2**17.
        b: [N, K] int8.

    Returns:
        [M, N] int32.
    """
    # oneDNN misreads the strides of a matrix that is one column wide.
    if not has_exact_int8_dot() or a.shape[1] == 1:
        return _int8_mm_in_float32(a, b)
    if b.stride(0) % _PAGE == 0 and a.shape[0] <= _FEW_ROWS:
        return torch._int_mm(b, a.t()).t().contiguous()
    return torch._int_mm(a, b.t())


def _int8_mm_in_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = a.new_zeros((a.shape[0], b.shape[0]), dtype=torch.int32)
    a_parts = a.float().split(_EXACT_TERMS, dim=1)
    blocks = zip(out.split(_FLOAT_ROWS, dim=1), b.split(_FLOAT_ROWS), strict=True)
    for out_block, b_block in blocks:
        b_parts = b_block.float().split(_EXACT_TERMS, dim=1)
        for a_part, b_part in zip(a_parts, b_parts, strict=True):
            out_block += (a_part @ b_part.t()).int()
    return out


def _int8_mm_fake(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


# torch.compile would unroll the loops.
register_op(
    op_name="cpu_int8_mm",
    op_func=int8_mm,
    fake_impl=_int8_mm_fake,
    dispatch_key="CPU",
)


def _static_scaled_int8_quant(
    result: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    azp: torch.Tensor | None,
) -> None:
    result.copy_(static_per_tensor_quant_int8(x, scale, azp)[0])


# vLLM's build for CPUs without AVX-512 lacks the operator behind `scaled_int8_quant`,
# by which experts with one scale a tensor are quantized again as they load.
if current_platform.is_cpu() and not hasattr(ops._C, "static_scaled_int8_quant"):
    _VLLM = Library("_C", "FRAGMENT")
    _VLLM.define(
        "static_scaled_int8_quant("
        "Tensor! result, Tensor input, Tensor scale, Tensor? azp) -> ()"
    )
    _VLLM.impl("static_scaled_int8_quant", _static_scaled_int8_quant, "CPU")
