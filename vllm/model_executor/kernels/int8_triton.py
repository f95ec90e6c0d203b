# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Pieces that Triton kernels share: those of INT8 (W8A8) linear layers, of the fused
MoE, and of its router."""

from typing import Any

import torch
import vllm.envs as envs
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Wait until the kernel before has finished; let the kernel after be launched.

    With programmatic dependent launch a kernel starts while the one before it ends.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _round_to_byte(x):
    """The low byte of the result is x rounded to an integer, halves to even.

    Below 2**22 the sum has a unit in the last place of one, so that adding rounds and
    the integer appears in the low bits of the mantissa.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def quantize(x, absmax):
    """Dynamic quantization: int32 with the quantized value in its low byte.

    Args:
        x: float32.
        absmax: float32 that broadcasts to x, the largest magnitude.

    The fused multiply-add rounds once, so that the result is x * (127 / absmax), with
    the float32 quotient, rounded exactly.
    """
    inverse = tl.div_rn(127.0, absmax)
    rounded = tl.fma(x, tl.broadcast_to(inverse, x.shape), 12582912.0)
    return rounded.to(tl.int32, bitcast=True)


@triton.jit
def quantize_static(x, scale):
    """Static quantization: int32 with the quantized value in its low byte."""
    x = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    return _round_to_byte(tl.clamp(x, -128.0, 127.0))


@triton.jit
def dot4(a, b, sums, DOT4: tl.constexpr):
    """sums + a . b, where an int32 holds four int8."""
    if DOT4:
        sums = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, sums],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        for i in tl.static_range(0, 4):
            sums += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
    return sums


@triton.jit
def pack4(quantized):
    """The low bytes of int32 [..., 4] in one int32 [...]."""
    shift = tl.arange(0, 4) * 8
    return tl.sum((quantized & 0xFF) << shift, axis=-1)


@triton.jit
def quantize_token(x, static_scale_ptr, STATIC: tl.constexpr):
    """A token x [BLOCK_SIZE_K, 4] float32 as words of four int8, and its scale."""
    if STATIC:
        scale = tl.load(static_scale_ptr)
        words = pack4(quantize_static(x, scale))
    else:
        absmax = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0), 1e-10)
        scale = tl.div_rn(absmax, 127.0)
        words = pack4(quantize(x, absmax))
    return words, scale


# torch.compile cannot look into the platform's cache.
@torch.compiler.assume_constant_result
def is_hopper() -> bool:
    """Whether this is a Hopper GPU, where the kernels were measured."""
    return current_platform.is_cuda() and current_platform.is_device_capability(90)


# Nor into environment variables.
@torch.compiler.assume_constant_result
def serves_here() -> bool:
    """Whether kernels serve on this platform that upstream has others for: on Hopper,
    where they were measured; with VLLM_QUARK_INT8_KERNELS=on on each GPU that they are
    compiled for, which are AMD's and NVIDIA's from compute capability 8.0 on."""
    # Patch 0031 declares it; builds without that patch have no such switch.
    asked = getattr(envs, "VLLM_QUARK_INT8_KERNELS", "auto") == "on"
    return is_hopper() or (
        asked
        and (
            current_platform.is_rocm()
            or (
                current_platform.is_cuda()
                and current_platform.has_device_capability(80)
            )
        )
    )


def num_sms(x: torch.Tensor) -> int:
    """Multiprocessors of the GPU that holds x; 1 elsewhere."""
    if not x.is_cuda:
        return 1
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def has_dot4(x: torch.Tensor) -> bool:
    """Whether kernels on x may multiply four int8 with dp4a: DOT4 of `dot4`."""
    return x.is_cuda and not torch.version.hip


def has_pdl(x: torch.Tensor) -> bool:
    """Whether a kernel on x may be launched while the one before it ends."""
    return (
        x.is_cuda
        and not torch.version.hip
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
    )


def launch(
    kernel: Any, grid: tuple[int, ...], pdl: bool, *args: Any, **options: Any
) -> None:
    """Launch a kernel; with pdl while the one before ends, which its PDL is told."""
    if pdl:
        options["launch_pdl"] = True
    kernel[grid](*args, PDL=pdl, **options)
